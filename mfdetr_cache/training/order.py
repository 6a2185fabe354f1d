"""The order in which training visits images and their views; it depends on the seed alone."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Parts of the cache whose rows are mixed with one another when a training goes part by part.
PARTS_MIXED = 8


@dataclass(frozen=True, slots=True)
class Order:
    """Which rows each step trains on: all rows once per epoch.

    Attributes:
        rows: Rows to train on.
        batch_size: Rows per step; the last step of an epoch may have fewer.
        seed: Of the training.
        part_of_row: Part of each of these rows, to go through the cache some parts at a time; None
            mixes all rows.
    """

    rows: tuple[int, ...]
    batch_size: int
    seed: int
    part_of_row: tuple[int, ...] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show every row once."""
        return steps_per_epoch(len(self.rows), self.batch_size)

    def rows_of(self, step: int) -> list[int]:
        """The rows of one step, counted from 0 over all epochs, for all processes together."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.part_of_row is None:
            order = epoch_order(len(self.rows), self.seed, epoch)
        else:
            order = epoch_order_by_parts(self.part_of_row, self.seed, epoch)
        first = position * self.batch_size
        return [self.rows[i] for i in order[first : first + self.batch_size]]


@functools.lru_cache(maxsize=4)
def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of the rows of one epoch, counted from 0."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


@functools.lru_cache(maxsize=4)
def epoch_order_by_parts(part_of_row: tuple[int, ...], seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of the rows of one epoch that reads some parts of the cache at a time.

    Parts are drawn in random order; the rows of ``PARTS_MIXED`` of them at a time are mixed. An
    image then meets others of its part as rarely as one in ``PARTS_MIXED``, and what is read at a
    time lies in few files.

    Args:
        part_of_row: Part of each row.
        seed: Of the training.
        epoch: Counted from 0.

    Returns:
        A permutation of the positions of ``part_of_row``.
    """
    random = np.random.default_rng((seed, epoch))
    parts = np.array(part_of_row)
    names = random.permutation(np.unique(parts))
    groups = [names[i : i + PARTS_MIXED] for i in range(0, len(names), PARTS_MIXED)]
    return np.concatenate([random.permutation(np.flatnonzero(np.isin(parts, g))) for g in groups])


def view_of_epoch(views: Sequence[str], seed: int, row: int, epoch: int) -> str:
    """Which view of an image an epoch shows: as many epochs as there are views show each once.

    Args:
        views: Names of the views.
        seed: Of the training.
        row: Row of the image.
        epoch: Counted from 0.

    Returns:
        Name of the view.
    """
    cycle, position = divmod(epoch, len(views))
    order = np.random.default_rng((seed, row, cycle)).permutation(len(views))
    return views[int(order[position])]


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Steps that show every row once."""
    return -(-num_rows // batch_size)
