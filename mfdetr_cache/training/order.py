"""The order in which training visits images and their views; it depends on the seed alone."""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.training.batch import PARTS_MIXED


@functools.lru_cache(maxsize=4)
def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch: every row once.

    Args:
        num_rows: How many rows there are.
        seed: Of the training.
        epoch: Counted from 0.

    Returns:
        A permutation that depends on nothing else.
    """
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


@functools.lru_cache(maxsize=4)
def epoch_order_by_parts(part_of_row: tuple[int, ...], seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch, some parts of the cache at a time: every row once.

    Parts are drawn in random order; the rows of ``PARTS_MIXED`` of them at a time are mixed. An
    image then meets others of its part as rarely as one in ``PARTS_MIXED``, and what is read at a
    time lies in few files.

    Args:
        part_of_row: Part of each row.
        seed: Of the training.
        epoch: Counted from 0.

    Returns:
        A permutation that depends on nothing else.
    """
    random = np.random.default_rng((seed, epoch))
    parts = np.array(part_of_row)
    names = random.permutation(np.unique(parts))
    groups = [names[i : i + PARTS_MIXED] for i in range(0, len(names), PARTS_MIXED)]
    return np.concatenate([random.permutation(np.flatnonzero(np.isin(parts, g))) for g in groups])


def rows_of_step(
    rows: Sequence[int],
    batch_size: int,
    seed: int,
    step: int,
    part_of_row: tuple[int, ...] | None = None,
) -> list[int]:
    """The rows of one step; the last batch of an epoch may be smaller.

    Args:
        rows: Rows to train on.
        batch_size: Rows per step.
        seed: Of the training.
        step: Step, counted from 0 over all epochs.
        part_of_row: Part of each of these rows, to go through the cache part by part; None mixes
            all rows.

    Returns:
        Rows of the cache.
    """
    per_epoch = steps_per_epoch(len(rows), batch_size)
    epoch, position = divmod(step, per_epoch)
    if part_of_row is None:
        order = epoch_order(len(rows), seed, epoch)
    else:
        order = epoch_order_by_parts(part_of_row, seed, epoch)
    chosen = order[position * batch_size : (position + 1) * batch_size]
    return [rows[i] for i in chosen]


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
    """Steps that show every row once.

    Args:
        num_rows: How many rows there are.
        batch_size: Rows per step.

    Returns:
        Number of steps.
    """
    return -(-num_rows // batch_size)
