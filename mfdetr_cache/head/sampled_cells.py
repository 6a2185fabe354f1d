"""The shortcut of training: only the cells that RoIAlign samples are computed, C1 is cropped first.

A few regions have fewer cells than the images they are cut out of. The network of ``mask_head.py``
computes the fused map at stride 4 and reads a fraction of it. Here the last layer of the image
encoder refines only the cells that some region reads, and what is linear changes places: the
channel mapper goes before the up-sampling, and RoIAlign of C1 before neck and mapper
(``c1_crops.py`` derives it). Outputs and gradients are the same up to the order of roundings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.head.batch import HeadBatch, RegionsByGroup
from mfdetr_cache.head.c1_crops import moments_of, neck_affine
from mfdetr_cache.head.fusion import resize_map
from mfdetr_cache.head.image_encoder import DeformableImageEncoder
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.head.packing import PackedImages
from mfdetr_cache.ops.devices import to_device
from mfdetr_cache.ops.packed_levels import SizesHw, first_tokens

# Cells around a box, at the fused level, that bilinear up-sampling and RoIAlign may reach into:
# one each, and one for where a map's size is not a multiple of its stride.
_MARGIN = 3


class SampledCellsHead(MaskHead):
    """The mask network, which takes the shortcut in training where regions are few.

    With crops of C1 in place of the map, from a cache with ``--c1 roi``, it always does. Parameters
    and their names are those of :class:`MaskHead`.
    """

    def region_features(self, grouped: RegionsByGroup) -> Tensor:
        """Features R_i inside each box, in the order of the groups: (R, s, s, d)."""
        has_crops = self.c1 is not None and grouped.c1_crops is not None
        if has_crops or (self.training and self._has_few_regions(grouped)):
            sampled: Tensor = self._sampled_features(grouped)
            return sampled
        return super().region_features(grouped)

    # Sizes and counts differ from batch to batch: nothing that a compiler could keep.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def prepare(self, batch: HeadBatch) -> HeadBatch:
        """Crop C1 if :meth:`forward` would; output and gradients stay the same.

        This needs no weights, so it can be done for the next batch during this one's backward pass.
        """
        if self.c1 is None or batch.c1_crops is not None or not len(batch.queries):
            return batch
        grouped = batch.by_group()
        if not self._has_few_regions(grouped):
            return batch
        cropped = self._crop_c1(grouped)
        assert cropped.c1_crops is not None
        # Groups without a region are not in `cropped`; they stay, as images are counted over all.
        by_members = {group.members: group for group in cropped.groups}
        return replace(
            batch,
            groups=tuple(by_members.get(group.members, group) for group in batch.groups),
            c1_crops=grouped.to_batch(cropped.c1_crops),
        )

    def _has_few_regions(self, grouped: RegionsByGroup) -> bool:
        """Whether the regions have fewer cells than the fused maps they are cut out of."""
        cells = 0
        for group in grouped.groups:
            height, width = group.input_hw
            cells += len(group.members) * height * width // self.align.stride**2
        return len(grouped.order) * self.align.size**2 < cells

    # Sizes and counts differ from batch to batch: nothing that a compiler could keep.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _sampled_features(self, grouped: RegionsByGroup) -> Tensor:
        if self.c1 is not None and grouped.c1_crops is None:
            grouped = self._crop_c1(grouped)
        refined = zip(grouped.groups, self._mapped_levels(grouped), strict=True)
        # One group after the other: large maps are gone before the next are made.
        upsampled = (
            self.fusion(None, maps, group.input_hw)
            if self.c1 is None
            else resize_map(maps, group.c1_hw)
            for group, maps in refined
        )
        pairs = zip(upsampled, grouped.rois(), strict=True)
        aligned = torch.cat([self.align(maps, rois) for maps, rois in pairs])
        return aligned if self.c1 is None else self._add_c1(aligned, grouped)

    def _mapped_levels(self, grouped: RegionsByGroup) -> list[Tensor]:
        """The refined level of each group after the channel mapper; unsampled cells may be zero."""
        encoder = self.image_encoder
        mapper = self.map_features if isinstance(self.map_features, nn.Conv2d) else None
        # Beside C1 the bias is added later: up-sampling keeps a constant, RoIAlign does not.
        bias = mapper.bias if mapper is not None and self.c1 is None else None
        levels = [self.projections(group.maps) for group in grouped.groups]
        if not isinstance(encoder, DeformableImageEncoder) or not encoder.omits_tokens:
            refined = [encoder(maps) for maps in levels]
            if mapper is None:
                return refined
            return [functional.conv2d(maps, mapper.weight, bias) for maps in refined]
        fused = encoder.fused_level
        tokens, sampled = _refine_sampled(encoder, levels, grouped, self.levels[fused].stride)
        if mapper is not None:
            tokens = functional.linear(tokens, mapper.weight[:, :, 0, 0], bias)
        # Back from sampled cells to a map for each group.
        shapes = [maps[fused].shape for maps in levels]
        counts = [b * h * w for b, _, h, w in shapes]
        cells = tokens.new_zeros(sum(counts), tokens.shape[1]).index_copy(0, sampled.cell, tokens)
        return [
            part.unflatten(0, (b, h, w)).permute(0, 3, 1, 2)
            for part, (b, _, h, w) in zip(cells.split(counts), shapes, strict=True)
        ]

    def _crop_c1(self, grouped: RegionsByGroup) -> RegionsByGroup:
        assert self.c1 is not None
        groups, crops = [], []
        for group, rois in zip(grouped.groups, grouped.rois(), strict=True):
            c1 = group.maps[self.c1.name]
            crops.append(self.align(c1, rois))
            others = {name: m for name, m in group.maps.items() if name != self.c1.name}
            c1_hw = (int(c1.shape[-2]), int(c1.shape[-1]))
            groups.append(replace(group, maps=others, c1_moments=moments_of(c1), c1_hw=c1_hw))
        return replace(grouped, groups=tuple(groups), c1_crops=torch.cat(crops))

    def _add_c1(self, aligned: Tensor, grouped: RegionsByGroup) -> Tensor:
        """Add the projected crops of C1 to the encoder's region features."""
        crops = grouped.c1_crops
        assert crops is not None
        moments = [g.c1_moments for g in grouped.groups if g.c1_moments is not None]
        # Neck and mapper as one affine map for each image.
        matrix, constant = neck_affine(self.fusion.neck, torch.cat(moments))
        mapper = self.map_features
        if isinstance(mapper, nn.Conv2d):
            assert mapper.bias is not None
            weight = mapper.weight[:, :, 0, 0].to(matrix.dtype)
            matrix, constant = weight @ matrix, constant @ weight.T + mapper.bias.to(matrix.dtype)
        image = to_device(torch.from_numpy(grouped.image), grouped.device)
        matrix, constant = (t.to(crops.dtype).index_select(0, image) for t in (matrix, constant))
        from_c1 = torch.einsum("rhwc,rdc->rhwd", crops, matrix)
        # The constant counts only where samples lie inside the map: RoIAlign takes zeros outside.
        coverage = self.align.coverage(grouped.boxes_xyxy, grouped.c1_hw)
        rows, columns = to_device(torch.from_numpy(coverage), grouped.device).to(constant.dtype)
        inside = (rows[:, :, None] * columns[:, None])[..., None]
        features: Tensor = aligned + from_c1 + inside * constant[:, None, None]
        return features


def _refine_sampled(
    encoder: DeformableImageEncoder,
    groups: Sequence[Sequence[Tensor]],
    grouped: RegionsByGroup,
    stride: int,
) -> tuple[Tensor, "SampledCells"]:
    """Refine those cells of the fused level that regions read, of images of any sizes at once.

    ``encoder`` has one layer or more, ``groups`` the levels of each group of equal-sized images,
    finest first, (B, D, h, w); ``stride`` are input pixels per cell of the fused level. Returns the
    refined cells, shape (N, D), and which they are.
    """
    packed = PackedImages.of(groups, encoder.level_embed, encoder.sine)
    memory = packed.tokens
    for layer in encoder.layers[:-1]:
        memory = layer(memory, packed.position, packed.centres, memory, packed.levels)
    sampled = sampled_cells(
        grouped.image, grouped.boxes_xyxy, packed.sizes_hw, encoder.fused_level, stride
    ).to(memory.device)
    refined: Tensor = encoder.layers[-1](
        memory[sampled.token],
        packed.position[sampled.token],
        packed.centres[sampled.token],
        memory,
        packed.levels.for_queries(sampled.image),
    )
    return refined, sampled


@dataclass(frozen=True, slots=True)
class SampledCells:
    """Some cells of one level of packed images.

    Attributes:
        image: Image of each cell, int32, increasing, shape (N,).
        token: Index among all tokens, int64, shape (N,).
        cell: Index among all cells of that level, int64, shape (N,).
    """

    image: Tensor
    token: Tensor
    cell: Tensor

    def to(self, device: torch.device) -> "SampledCells":
        """The same on a device; the CPU does not wait for the copy."""
        return SampledCells(*(to_device(t, device) for t in (self.image, self.token, self.cell)))


def sampled_cells(
    image: NDArray[np.int64],
    boxes_xyxy: NDArray[np.floating],
    sizes_hw: Sequence[SizesHw],
    level: int,
    stride: int,
) -> SampledCells:
    """Cells of a level that up-sampling and RoIAlign read, computed on the CPU.

    Their number decides the shapes of later operations; asking a GPU would wait for its queue. Of
    the image of each box, (R,), and boxes (R, 4) in network input pixels; ``sizes_hw`` are those of
    each level, for each image, ``stride`` the input pixels per cell of the level.
    """
    sizes = [size[level] for size in sizes_hw]
    low = np.floor(boxes_xyxy[:, :2] / stride) - _MARGIN
    end = np.ceil(boxes_xyxy[:, 2:] / stride) + _MARGIN + 1
    # Slices would count negative numbers from the other side.
    corners = np.concatenate((low, end), axis=1).clip(0, max(map(max, sizes))).astype(np.int64)
    read = [np.zeros(size, np.bool_) for size in sizes]
    for owner, (left, top, right, bottom) in zip(image.tolist(), corners.tolist(), strict=True):
        read[owner][top:bottom, left:right] = True
    inside = [np.flatnonzero(one) for one in read]
    counts = np.prod(sizes, axis=1)

    def after(starts: NDArray[np.int64]) -> Tensor:
        shifted = [cells + start for cells, start in zip(inside, starts, strict=True)]
        return torch.from_numpy(np.concatenate(shifted))

    owners = np.repeat(np.arange(len(inside), dtype=np.int32), [len(cells) for cells in inside])
    return SampledCells(
        image=torch.from_numpy(owners),
        token=after(first_tokens(sizes_hw)[:, level]),
        cell=after(counts.cumsum() - counts),
    )
