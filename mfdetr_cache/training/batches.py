"""Batches for training: their order, reading ahead in threads, the way to the device."""

import functools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.devices import to_device
from mfdetr_cache.errors import TrainingError
from mfdetr_cache.head.batch import HeadBatch, MapGroup, map_groups
from mfdetr_cache.quantisation import decode_maps
from mfdetr_cache.training.regions import RegionTargets
from mfdetr_cache.types import CachedImage

LoadedT = TypeVar("LoadedT")

# Batches being prepared while one is computed; bounds the memory of the reader.
READ_AHEAD = 3
# Parts of the cache whose rows are mixed with one another when a training goes part by part.
PARTS_MIXED = 8


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One image ready for training.

    Attributes:
        image: As cached, with the maps the head reads.
        regions: What is trained on.
    """

    image: CachedImage
    regions: RegionTargets


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A batch on the training device.

    Attributes:
        inputs: What the mask network takes.
        masks: Target coverage, shape (R, t, t).
        labels: Labels of the objects, shape (R,).
        outside: Area of each object outside its box over the box's area, shape (R,).
        image_ids: COCO ids of the images, to name them when something goes wrong.
    """

    inputs: HeadBatch
    masks: Tensor
    labels: Tensor
    outside: Tensor
    image_ids: tuple[int, ...]


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


def collate(
    samples: Sequence[TrainSample],
    map_names: Sequence[str],
    device: torch.device,
    groups: tuple[MapGroup, ...] | None = None,
) -> TrainBatch:
    """Some samples as one batch.

    Args:
        samples: At least one.
        map_names: Maps the head reads.
        device: Where the batch lives.
        groups: The maps of the same images where they are on the device already.

    Returns:
        The batch; it may have no region.
    """
    queries, boxes, owner = [], [], []
    for index, sample in enumerate(samples):
        regions = sample.regions
        height, width = sample.image.geometry.resized_hw
        scale = np.array([width, height, width, height], dtype=np.float32)
        queries.append(sample.image.queries[regions.query_index].astype(np.float32))
        boxes.append(regions.boxes_xyxy_norm * scale)
        owner.append(np.full(len(regions), index, dtype=np.int64))

    def joined(parts: Sequence[NDArray[np.generic]]) -> Tensor:
        return to_device(torch.from_numpy(np.concatenate(parts)), device)

    inputs = HeadBatch(
        groups=map_groups([s.image for s in samples], map_names, device)
        if groups is None
        else groups,
        queries=joined(queries),
        boxes_xyxy=torch.from_numpy(np.concatenate(boxes)),
        image_index=joined(owner),
        c1_crops=_crops_of(samples, device),
        counts=tuple(len(s.regions) for s in samples),
    )
    return TrainBatch(
        inputs=inputs,
        masks=joined([s.regions.masks for s in samples]),
        labels=joined([s.regions.labels for s in samples]),
        outside=joined([s.regions.outside for s in samples]),
        image_ids=tuple(s.image.image_id for s in samples),
    )


def _crops_of(samples: Sequence[TrainSample], device: torch.device) -> Tensor | None:
    """The crop of C1 of every region, where the cache holds crops."""
    parts = []
    for sample in samples:
        found = sample.image.c1_crops
        if found is None:
            return None
        count, side = len(found.query_index), found.crops.hw[1]
        if not len(sample.regions):
            continue
        # Queries are stored in rising order, so that a region's crop is found by bisection.
        place = np.searchsorted(found.query_index, sample.regions.query_index)
        held = np.minimum(place, max(count - 1, 0))
        if not count or (found.query_index[held] != sample.regions.query_index).any():
            raise TrainingError(
                f"image {sample.image.image_id}: the cache has no crop of C1 for a matched query; "
                "it holds those of the matching it was extracted with"
            )
        decoded = decode_maps([found.crops], device)[0].permute(1, 2, 0)
        crops = decoded.reshape(count, side, side, -1)
        parts.append(crops[to_device(torch.from_numpy(place), device)])
    return torch.cat(parts) if parts else None


def read_ahead(
    load: Callable[[int, int], LoadedT],
    rows_of: Callable[[int], list[int]],
    steps: range,
    num_threads: int,
) -> Generator[list[LoadedT], None, None]:
    """The samples of one step after the other, prepared in threads of this process.

    Args:
        load: Reads and prepares a row for a step; safe to call from several threads.
        rows_of: Rows of a step.
        steps: Steps to go through.
        num_threads: How many threads.

    Yields:
        What was loaded for a step, in the order of its rows.
    """
    with ThreadPoolExecutor(num_threads, "reader") as pool:
        ahead: deque[list[Future[LoadedT]]] = deque()
        coming = iter(steps)
        try:
            while True:
                while len(ahead) < READ_AHEAD:
                    step = next(coming, None)
                    if step is None:
                        break
                    ahead.append([pool.submit(load, row, step) for row in rows_of(step)])
                if not ahead:
                    return
                yield [future.result() for future in ahead.popleft()]
        finally:
            for futures in ahead:
                for future in futures:
                    future.cancel()
