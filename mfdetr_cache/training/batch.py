"""One training batch: images with their regions, on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.errors import TrainingError
from mfdetr_cache.head.batch import HeadBatch, MapGroup, map_groups
from mfdetr_cache.ops.devices import to_device
from mfdetr_cache.ops.quantisation import decode_maps
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
