"""Which rows of a cache a training learns from, and their order, which its seed alone decides."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import ConfigError, TrainingError
from mfdetr_cache.matching.objects import trainable_objects
from mfdetr_cache.training.config import TrainConfig

# Parts of the cache whose rows are mixed with one another when a training goes part by part.
PARTS_MIXED = 8


def trainable_rows(cache: FeatureCache, train: TrainConfig) -> list[int]:
    """Rows with at least one object to learn from, in order; TrainingError if there is none.

    Respects ``held_out``, ``val_split`` and ``label_fraction``.
    """
    if train.val_split:
        cache, _ = cache.split(train.val_split)
    rows = [
        row for row in cache.rows if len(trainable_objects(cache.ground_truth(row), train.held_out))
    ]
    if not rows:
        raise TrainingError(
            f"no image of {cache.path} has an object to learn from (only crowds, categories the "
            "detector does not know, or nothing); extract a split with instance masks"
        )
    return kept_rows(rows, train.label_fraction, train.seed)


def kept_rows(rows: Sequence[int], fraction: float, seed: int) -> list[int]:
    """A random fraction of rows, at least one; with one seed, smaller fractions are subsets."""
    order = np.random.default_rng((seed, len(rows))).permutation(len(rows))
    kept = order[: max(1, round(fraction * len(rows)))]
    return [rows[i] for i in sorted(kept)]


@dataclass(frozen=True, slots=True)
class Order:
    """The rows of each step; every row once per epoch.

    Attributes:
        batch_size: Rows per step; the last step of an epoch may have fewer.
        part_of_row: Part of each row, to shuffle within some parts at a time; None shuffles all.
    """

    rows: tuple[int, ...]
    batch_size: int
    seed: int
    part_of_row: tuple[int, ...] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch."""
        return steps_per_epoch(len(self.rows), self.batch_size)

    def rows_of(self, step: int) -> list[int]:
        """The rows of a step (counted from 0 over all epochs) of all processes together."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.part_of_row is None:
            order = epoch_order(len(self.rows), self.seed, epoch)
        else:
            order = epoch_order_by_parts(self.part_of_row, self.seed, epoch)
        first = position * self.batch_size
        return [self.rows[i] for i in order[first : first + self.batch_size]]


@functools.lru_cache(maxsize=4)
def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of the rows for one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


@functools.lru_cache(maxsize=4)
def epoch_order_by_parts(part_of_row: tuple[int, ...], seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of ``part_of_row`` for one epoch that reads few parts of the cache at a time.

    Parts are drawn in random order, ``PARTS_MIXED`` at a time, and the rows of these are shuffled
    together.
    """
    random = np.random.default_rng((seed, epoch))
    parts = np.array(part_of_row)
    names = random.permutation(np.unique(parts))
    groups = [names[i : i + PARTS_MIXED] for i in range(0, len(names), PARTS_MIXED)]
    return np.concatenate([random.permutation(np.flatnonzero(np.isin(parts, g))) for g in groups])


def view_of_epoch(views: Sequence[str], seed: int, row: int, epoch: int) -> str:
    """The view of an image in an epoch; N views are each shown once in N epochs."""
    cycle, position = divmod(epoch, len(views))
    order = np.random.default_rng((seed, row, cycle)).permutation(len(views))
    return views[int(order[position])]


def chosen_views(views: Sequence[str], wanted: str) -> tuple[str, ...]:
    """The views of a cache that a training walks through; ConfigError if it has fewer."""
    if wanted == "all":
        return tuple(views)
    count = 1 if wanted == "base" else int(wanted)
    if count > len(views):
        raise ConfigError(
            f"views={wanted}: the cache has {len(views)}; extract one with --views {count - 1}"
        )
    return tuple(views[:count])


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """The last step of an epoch may have fewer rows."""
    return -(-num_rows // batch_size)
