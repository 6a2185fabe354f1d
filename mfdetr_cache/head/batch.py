"""What the mask network takes and gives. Maps are never padded: equal sizes share a group."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.ops.devices import to_device
from mfdetr_cache.ops.quantisation import decode_groups
from mfdetr_cache.types import CachedImage, DetectorOutput, ImageGeometry


@dataclass(frozen=True, slots=True)
class MapGroup:
    """The maps of those images of a batch that have the same network input size.

    Nothing is padded, so no layer can see padding and an image's result does not depend on its
    neighbours.

    Attributes:
        maps: Map name to (B, C, h, w).
        input_hw: Network input size in pixels.
        members: Position of each image in the batch.
        c1_moments: Moments of C1 where only crops of it are there, float64, shape (B, C + 1, C).
        c1_hw: Height and width of C1 then.
    """

    maps: dict[str, Tensor]
    input_hw: tuple[int, int]
    members: tuple[int, ...]
    c1_moments: Tensor | None = None
    c1_hw: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class HeadBatch:
    """A batch for the mask network: maps of the images, and R regions to segment.

    Attributes:
        groups: The images' maps.
        queries: The query of each region, shape (R, query_dim).
        boxes_xyxy: The box of each region in network input pixels, not clipped, shape (R, 4). May
            stay on the CPU when the rest is on a GPU: what is computed depends on where they are.
        image_index: The image of each region, int64, shape (R,).
        c1_crops: RoIAlign of C1 over each box, in place of the map, shape (R, r, r, C).
        counts: Regions of each image, where that is known without asking the device; regions are
            then in the order of their images.
    """

    groups: tuple[MapGroup, ...]
    queries: Tensor
    boxes_xyxy: Tensor
    image_index: Tensor
    c1_crops: Tensor | None = None
    counts: tuple[int, ...] | None = None

    # How many regions there are decides what is done; a compiler could keep nothing.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def by_group(self) -> "RegionsByGroup":
        """Regions in the order of the groups' images.

        Returns:
            Where they are, found out on the CPU.
        """
        counts = self.counts
        if counts is None:
            images = sum(len(group.members) for group in self.groups)
            owner = self.image_index.cpu().numpy()
            counts = tuple(np.bincount(owner, minlength=images).tolist())
        else:
            owner = np.repeat(np.arange(len(counts)), counts)
        of_group = [sum(counts[m] for m in g.members) for g in self.groups]
        groups = [g for g, count in zip(self.groups, of_group, strict=True) if count]
        members = [m for group in groups for m in group.members]
        place = np.zeros(len(counts), np.int64)
        place[members] = np.arange(len(members))
        order = np.argsort(place[owner], kind="stable")
        boxes = self.boxes_xyxy.detach().cpu().numpy()[order]
        return RegionsByGroup(
            tuple(groups), tuple(c for c in of_group if c), order, place[owner][order], boxes
        )


@dataclass(frozen=True, slots=True)
class RegionsByGroup:
    """Where the regions of a batch are, in the order of the groups' images, on the CPU.

    Attributes:
        groups: Groups that have regions.
        counts: How many each of them has.
        order: Which region of the batch each is, shape (R,).
        image: Its image, counted over these groups, rising, shape (R,).
        boxes_xyxy: Its box in network input pixels, shape (R, 4).
    """

    groups: tuple[MapGroup, ...]
    counts: tuple[int, ...]
    order: NDArray[np.int64]
    image: NDArray[np.int64]
    boxes_xyxy: NDArray[np.floating]

    @property
    def device(self) -> torch.device:
        """Where the maps are."""
        return next(iter(self.groups[0].maps.values())).device

    @property
    def c1_hw(self) -> NDArray[np.int64]:
        """Height and width of C1 for each region, where only crops of it are there, (R, 2)."""
        return np.repeat([group.c1_hw for group in self.groups], self.counts, axis=0)

    # Other indices in every batch, through pinned memory: nothing that a compiler could keep.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def rois(self) -> Sequence[Tensor]:
        """What RoIAlign takes for the maps of each group.

        Returns:
            For each group the index of the image inside it, then the box, shape (count, 5).
        """
        sizes = [len(group.members) for group in self.groups]
        before = np.repeat(np.cumsum(sizes) - sizes, self.counts)
        index = (self.image - before).astype(self.boxes_xyxy.dtype)
        rois = torch.from_numpy(np.concatenate((index[:, None], self.boxes_xyxy), axis=1))
        split: Sequence[Tensor] = to_device(rois, self.device).split(list(self.counts))
        return split

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def from_batch(self, rows: Tensor) -> Tensor:
        """Something of each region, in the order of these.

        Args:
            rows: In the order of the batch, shape (R, ...).

        Returns:
            The same rows, shape (R, ...).
        """
        return rows.index_select(0, to_device(torch.from_numpy(self.order), rows.device))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def to_batch(self, rows: Tensor) -> Tensor:
        """Something of each of these regions, in the order of the batch.

        Args:
            rows: In the order of these, shape (R, ...).

        Returns:
            The same rows, shape (R, ...).
        """
        back = torch.from_numpy(self.order.argsort())
        return rows.index_select(0, to_device(back, rows.device))


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What the mask network says about R regions.

    Attributes:
        mask_logits: Over the box of each region, before the sigmoid, shape (R, r, r).
        mask_iou: Predicted IoU of the mask for each label, unbounded, shape (R, K); None without
            mask scoring.
        codes: Mask codes the logits were decoded from, shape (R, K'), where the head predicts such.
    """

    mask_logits: Tensor
    mask_iou: Tensor | None
    codes: Tensor | None = None


def live_groups(
    outputs: Sequence[DetectorOutput],
    geometries: Sequence[ImageGeometry],
    map_names: Sequence[str],
) -> tuple[MapGroup, ...]:
    """The maps of images that a detector has just seen one by one, equal sizes together.

    Args:
        outputs: One per image, each of batch size 1; gradients flow back into them.
        geometries: Sizes of the images.
        map_names: Maps to take.

    Returns:
        One group per network input size.
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
