"""What the mask network takes and gives. Maps are never padded: equal sizes share a group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfdetr_cache.quantisation import decode_maps
from mfdetr_cache.types import CachedImage


@dataclass(frozen=True, slots=True)
class MapGroup:
    """The maps of those images of a batch that have the same network input size.

    Nothing is padded, so no layer can see padding and an image's result does not depend on its
    neighbours.

    Attributes:
        maps: Map name to (B, C, h, w).
        input_hw: Network input size in pixels.
        image_index: Position of each image in the batch, int64, shape (B,).
    """

    maps: dict[str, Tensor]
    input_hw: tuple[int, int]
    image_index: Tensor


@dataclass(frozen=True, slots=True)
class HeadBatch:
    """A batch for the mask network: maps of the images, and R regions to segment.

    Attributes:
        groups: The images' maps.
        queries: The query of each region, shape (R, query_dim).
        boxes_xyxy: The box of each region in network input pixels, not clipped, shape (R, 4).
        image_index: The image of each region, int64, shape (R,).
    """

    groups: tuple[MapGroup, ...]
    queries: Tensor
    boxes_xyxy: Tensor
    image_index: Tensor


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What the mask network says about R regions.

    Attributes:
        mask_logits: Over the box of each region, before the sigmoid, shape (R, r, r).
        mask_iou: Predicted IoU of the mask for each label, unbounded, shape (R, K); None without
            mask scoring.
    """

    mask_logits: Tensor
    mask_iou: Tensor | None


def map_groups(
    images: Sequence[CachedImage], map_names: Sequence[str], device: torch.device
) -> tuple[MapGroup, ...]:
    """The maps of some images, equal sizes together.

    Args:
        images: Cached images.
        map_names: Maps to take.
        device: Where the result lives.

    Returns:
        One group per network input size; values are float32.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.geometry.input_hw, []).append(index)
    groups = []
    for input_hw, members in by_size.items():
        maps = {}
        for name in map_names:
            maps[name] = decode_maps([images[i].maps[name] for i in members], device)
        groups.append(MapGroup(maps, input_hw, torch.tensor(members, device=device)))
    return tuple(groups)
