"""Input and output of the mask network. Maps are never padded: equal sizes share a group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.ops.dequantisation import decode_groups
from mfdetr_cache.ops.devices import to_device
from mfdetr_cache.types import CachedImage, DetectorOutput, ImageGeometry


@dataclass(frozen=True, slots=True)
class MapGroup:
    """The maps of those images of a batch that have the same network input size.

    Nothing is padded, so an image's result does not depend on the other images.

    Attributes:
        maps: Map name to (B, C, h, w).
        input_hw: Network input size in pixels.
        members: Index of each image in the batch.
        c1_moments: Moments of C1 if it is given as crops, float64, shape (B, C + 1, C).
        c1_hw: Height and width of C1 in that case.
    """

    maps: dict[str, Tensor]
    input_hw: tuple[int, int]
    members: tuple[int, ...]
    c1_moments: Tensor | None = None
    c1_hw: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class QueryContext:
    """The queries q_1 to q_N that object-to-object attention attends to (Eq. 10).

    Attributes:
        queries: Of all images, shape (M, query_dim).
        image_index: The image of each, int64, shape (M,).
    """

    queries: Tensor
    image_index: Tensor


@dataclass(frozen=True, slots=True)
class HeadBatch:
    """Input of the mask network: maps of images and R regions to segment.

    Attributes:
        queries: Of each region, shape (R, query_dim).
        boxes_xyxy: In network input pixels, not clipped, shape (R, 4). May stay on the CPU when the
            rest is on a GPU: the boxes decide which cells are computed.
        image_index: The image of each region, int64, shape (R,).
        c1_crops: RoIAlign of C1 over each box, instead of the map, shape (R, r, r, C).
        counts: Regions of each image, if known without a copy from the device; regions are then
            sorted by image.
        context: The detected queries of the images if regions are only some of them, as in
            training; None if the regions are all.
    """

    groups: tuple[MapGroup, ...]
    queries: Tensor
    boxes_xyxy: Tensor
    image_index: Tensor
    c1_crops: Tensor | None = None
    counts: tuple[int, ...] | None = None
    context: QueryContext | None = None

    # The number of regions differs from batch to batch: nothing that a compiler could keep.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def by_group(self) -> "RegionsByGroup":
        """Sort the regions by the image they belong to, images in the order of the groups."""
        counts = self.counts
        if counts is None:
            images = sum(len(group.members) for group in self.groups)
            owner = self.image_index.cpu().numpy()
            counts = tuple(np.bincount(owner, minlength=images).tolist())
        else:
            owner = np.repeat(np.arange(len(counts)), counts)
        # Groups without a region are left out.
        of_group = [sum(counts[m] for m in g.members) for g in self.groups]
        groups = [g for g, count in zip(self.groups, of_group, strict=True) if count]
        members = [m for group in groups for m in group.members]
        rank = np.zeros(len(counts), np.int64)
        rank[members] = np.arange(len(members))
        order = np.argsort(rank[owner], kind="stable")
        crops = self.c1_crops
        if crops is not None:
            crops = crops.index_select(0, to_device(torch.from_numpy(order), crops.device))
        return RegionsByGroup(
            groups=tuple(groups),
            counts=tuple(c for c in of_group if c),
            order=order,
            image=rank[owner][order],
            boxes_xyxy=self.boxes_xyxy.detach().cpu().numpy()[order],
            c1_crops=crops,
        )


@dataclass(frozen=True, slots=True)
class RegionsByGroup:
    """The regions of a batch sorted by group and image; arrays are on the CPU.

    Attributes:
        groups: Groups that have regions.
        counts: Regions of each group.
        order: Index of each region in the batch, shape (R,).
        image: Index of its image among the images of these groups, increasing, shape (R,).
        boxes_xyxy: In network input pixels, shape (R, 4).
        c1_crops: RoIAlign of C1 over each box, instead of the map, shape (R, r, r, C).
    """

    groups: tuple[MapGroup, ...]
    counts: tuple[int, ...]
    order: NDArray[np.int64]
    image: NDArray[np.int64]
    boxes_xyxy: NDArray[np.floating]
    c1_crops: Tensor | None

    @property
    def device(self) -> torch.device:
        """Device of the maps."""
        return next(iter(self.groups[0].maps.values())).device

    @property
    def c1_hw(self) -> NDArray[np.int64]:
        """Height and width of the C1 that each region was cropped from, shape (R, 2)."""
        return np.repeat([group.c1_hw for group in self.groups], self.counts, axis=0)

    # Other indices in every batch, through pinned memory: nothing that a compiler could keep.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def rois(self) -> Sequence[Tensor]:
        """RoIAlign's boxes for the maps of each group: image inside the group, box, (count, 5)."""
        sizes = [len(group.members) for group in self.groups]
        before = np.repeat(np.cumsum(sizes) - sizes, self.counts)
        index = (self.image - before).astype(self.boxes_xyxy.dtype)
        rois = torch.from_numpy(np.concatenate((index[:, None], self.boxes_xyxy), axis=1))
        split: Sequence[Tensor] = to_device(rois, self.device).split(list(self.counts))
        return split

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def to_batch(self, rows: Tensor) -> Tensor:
        """Reorder per-region rows (R, ...) from group order to batch order."""
        back = torch.from_numpy(self.order.argsort())
        return rows.index_select(0, to_device(back, rows.device))


@dataclass(frozen=True, slots=True)
class RefinedRegions:
    """Regions after a stage of refinement.

    Attributes:
        boxes_xyxy: In network input pixels, shape (R, 4).
        codes: Mask codes, shape (R, K).
    """

    boxes_xyxy: Tensor
    codes: Tensor


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """Predictions for R regions.

    Attributes:
        mask_logits: Over the box of each region, before the sigmoid, shape (R, s, s), where s are
            the cells of the finer grid if there is one, else r.
        mask_iou: Predicted IoU of the mask for each label, unbounded, shape (R, K); None without
            mask scoring.
        codes: Mask codes the logits were decoded from, shape (R, K'); None for other predictors.
        coarse_logits: Before they were refined on a finer grid, shape (R, r, r); None without one.
        stages: Boxes and codes after each stage of refinement, the last of which ``mask_logits``
            lie over; empty for heads that leave the boxes where they are.
        refine: Logits (R, N) at points (R, N, 2), x and y in [0, 1] over each box, where they are
            predicted one by one. In training only; ``mask_logits`` are then the coarse mask's.
    """

    mask_logits: Tensor
    mask_iou: Tensor | None
    codes: Tensor | None = None
    coarse_logits: Tensor | None = None
    stages: tuple["RefinedRegions", ...] = ()
    refine: Callable[[Tensor], Tensor] | None = None


def live_groups(
    outputs: Sequence[DetectorOutput],
    geometries: Sequence[ImageGeometry],
    map_names: Sequence[str],
) -> tuple[MapGroup, ...]:
    """Group a live detector's maps by network input size; gradients flow back into them.

    ``outputs`` has one entry of batch size 1 per image.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, geometry in enumerate(geometries):
        by_size.setdefault(geometry.input_hw, []).append(index)
    return tuple(
        MapGroup(
            {name: torch.cat([outputs[i].maps[name] for i in members]) for name in map_names},
            input_hw,
            tuple(members),
        )
        for input_hw, members in by_size.items()
    )


def map_groups(
    images: Sequence[CachedImage], map_names: Sequence[str], device: torch.device
) -> tuple[MapGroup, ...]:
    """Decode the maps of cached images to float32, and group them by network input size."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.geometry.input_hw, []).append(index)
    members_of = list(by_size.values())
    maps: list[dict[str, Tensor]] = [{} for _ in members_of]
    for name in map_names:
        if name not in images[0].maps:
            continue
        stored = [[images[i].maps[name] for i in members] for members in members_of]
        for found, decoded in zip(maps, decode_groups(stored, device), strict=True):
            found[name] = decoded
    groups = []
    for (input_hw, members), found in zip(by_size.items(), maps, strict=True):
        crops = [c for i in members if (c := images[i].c1_crops) is not None]
        moments, c1_hw = None, (0, 0)
        if crops:
            stacked = np.stack([c.moments for c in crops]).astype(np.float64)
            moments, c1_hw = to_device(torch.from_numpy(stacked), device), crops[0].c1_hw
        groups.append(MapGroup(found, input_hw, tuple(members), moments, c1_hw))
    return tuple(groups)
