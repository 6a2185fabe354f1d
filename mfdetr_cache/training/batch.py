"""A micro-batch: images with the regions a head is trained on, on the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.errors import TrainingError
from mfdetr_cache.head.batch import HeadBatch, MapGroup, QueryContext, map_groups
from mfdetr_cache.ops.dequantisation import decode_maps
from mfdetr_cache.ops.devices import to_device
from mfdetr_cache.training.regions import RegionSettings, RegionTargets, SetTargets
from mfdetr_cache.types import CachedImage


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One image of a step, in host memory.

    Attributes:
        image: With the maps that any head reads.
        regions: Targets for each distinct settings of the heads.
        detected: Queries that are detections, shape (N,); None where no head attends to them.
    """

    image: CachedImage
    regions: Mapping[RegionSettings, RegionTargets]
    detected: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A micro-batch of R regions on the training device.

    Attributes:
        masks: Target coverage, shape (R, t, t), or (R, h, w) over one image.
        labels: Of the objects, -1 for none, shape (R,).
        outside: Area of each object outside its box, over the box's area, shape (R,).
        image_ids: COCO ids, for error messages.
        objects: With ``match="set"``, those of each image that has some; labels and masks are then
            of the objects, as in RegionTargets.
    """

    inputs: HeadBatch
    masks: Tensor
    labels: Tensor
    outside: Tensor
    image_ids: tuple[int, ...]
    objects: tuple[SetTargets, ...] = ()


def collate(
    images: Sequence[CachedImage],
    regions: Sequence[RegionTargets],
    map_names: Sequence[str],
    device: torch.device,
    groups: tuple[MapGroup, ...] | None = None,
    detected: Sequence[NDArray[np.int64]] | None = None,
) -> TrainBatch:
    """Images and their regions as one micro-batch, possibly without any region.

    ``groups`` are the maps of these images if they are on the device already; ``detected`` the
    detected queries of each where the head attends to them (Eq. 10). TrainingError if the cache
    holds C1 as crops and none for a region.
    """
    queries, boxes, owner = [], [], []
    for index, (image, targets) in enumerate(zip(images, regions, strict=True)):
        height, width = image.geometry.resized_hw
        scale = np.array([width, height, width, height], dtype=np.float32)
        queries.append(image.queries[targets.query_index].astype(np.float32))
        boxes.append(targets.boxes_xyxy_norm * scale)
        owner.append(np.full(len(targets), index, dtype=np.int64))

    def concatenated(parts: Sequence[NDArray[np.generic]]) -> Tensor:
        return to_device(torch.from_numpy(np.concatenate(parts)), device)

    inputs = HeadBatch(
        groups=map_groups(images, map_names, device) if groups is None else groups,
        queries=concatenated(queries),
        # On the CPU: where boxes are decides which cells are computed at all.
        boxes_xyxy=torch.from_numpy(np.concatenate(boxes)),
        image_index=concatenated(owner),
        c1_crops=_crops_of(images, regions, device),
        counts=tuple(len(targets) for targets in regions),
        context=None if detected is None else _context_of(images, regions, detected, device),
    )
    return TrainBatch(
        inputs=inputs,
        masks=concatenated([targets.masks for targets in regions]),
        labels=concatenated([targets.labels for targets in regions]),
        outside=concatenated([targets.outside for targets in regions]),
        image_ids=tuple(image.image_id for image in images),
        objects=tuple(found.objects for found in regions if found.objects is not None),
    )


def _context_of(
    images: Sequence[CachedImage],
    regions: Sequence[RegionTargets],
    detected: Sequence[NDArray[np.int64]],
    device: torch.device,
) -> QueryContext:
    """The union of detected and trained queries of each image."""
    seen = [np.union1d(d, r.query_index) for d, r in zip(detected, regions, strict=True)]
    queries = [image.queries[s] for image, s in zip(images, seen, strict=True)]
    owner = np.repeat(np.arange(len(images)), [len(s) for s in seen])
    return QueryContext(
        to_device(torch.from_numpy(np.concatenate(queries).astype(np.float32)), device),
        to_device(torch.from_numpy(owner), device),
    )


def _crops_of(
    images: Sequence[CachedImage], regions: Sequence[RegionTargets], device: torch.device
) -> Tensor | None:
    """The C1 crop of every region, shape (R, r, r, C); None if the cache holds no crops."""
    parts = []
    for image, wanted in zip(images, regions, strict=True):
        held = image.c1_crops
        if held is None:
            return None
        count, side = len(held.query_index), held.crops.hw[1]
        if not len(wanted):
            continue
        # Queries are stored in rising order, so that a region's crop is found by bisection.
        position = np.searchsorted(held.query_index, wanted.query_index)
        nearest = np.minimum(position, max(count - 1, 0))
        if not count or (held.query_index[nearest] != wanted.query_index).any():
            raise TrainingError(
                f"image {image.image_id}: the cache has no crop of C1 for a matched query; "
                "it holds those of the matching it was extracted with"
            )
        decoded = decode_maps([held.crops], device)[0].permute(1, 2, 0)
        crops = decoded.reshape(count, side, side, -1)
        parts.append(crops[to_device(torch.from_numpy(position), device)])
    return torch.cat(parts) if parts else None
