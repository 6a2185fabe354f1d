"""Images of different sizes as one sequence of tokens, and those of their cells that regions read.

A batch of COCO has images of six sizes. One pass over all tokens costs a GPU one start of each
operation instead of six; a network of this size is otherwise limited by these starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.head.blocks.deformable import cell_centres
from mfdetr_cache.head.position import sine_position
from mfdetr_cache.ops.devices import to_device
from mfdetr_cache.ops.packed_levels import PackedLevels, SizesHw, first_tokens

# Cells around a box, at the fused level, that bilinear up-sampling and RoIAlign may reach into:
# one each, and one for where a map's size is not a multiple of its stride.
_MARGIN = 3


@dataclass(frozen=True, slots=True)
class LevelTokens:
    """The encoder levels of images of one size, level by level.

    Attributes:
        tokens: Shape (B, S, D).
        centres: Normalised centre of each token's cell, shape (S, 2).
        position: Position of each token, sine and level embedding, shape (S, D).
        sizes_hw: Height and width of each level.
    """

    tokens: Tensor
    centres: Tensor
    position: Tensor
    sizes_hw: SizesHw

    @classmethod
    def of(cls, levels: Sequence[Tensor], level_embed: Tensor) -> "LevelTokens":
        """Line up maps.

        Args:
            levels: Maps, finest first, each (B, D, h, w).
            level_embed: Added to the position of each level's tokens, shape (L, D).

        Returns:
            The tokens.
        """
        device, dtype, width = levels[0].device, levels[0].dtype, levels[0].shape[1]
        sizes_hw = _sizes_of(levels)
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in levels], dim=1)
        centres = cell_centres(sizes_hw, device).to(torch.promote_types(dtype, torch.float32))
        rows = zip(level_embed, sizes_hw, strict=True)
        of_level = torch.cat([row.expand(h * w, -1) for row, (h, w) in rows])
        position = sine_position(centres, width) + of_level
        return cls(tokens, centres.to(dtype), position.to(dtype), sizes_hw)


@dataclass(frozen=True, slots=True)
class PackedImages:
    """The encoder levels of some groups of images, one image behind the other.

    Attributes:
        tokens: All tokens, shape (S, D).
        centres: Normalised centre of each token's cell, shape (S, 2).
        position: Position of each token, sine and level embedding, shape (S, D).
        levels: Whose the tokens are; every token is a query.
        sizes_hw: Height and width of each level, for each image.
    """

    tokens: Tensor
    centres: Tensor
    position: Tensor
    levels: PackedLevels
    sizes_hw: tuple[SizesHw, ...]

    @classmethod
    def of(cls, groups: Sequence[Sequence[Tensor]], level_embed: Tensor) -> "PackedImages":
        """Pack maps.

        Args:
            groups: For each group of images of one size their levels, finest first, (B, D, h, w).
            level_embed: Added to the position of each level's tokens, shape (L, D).

        Returns:
            The packed images, in the order of the groups.
        """
        first = groups[0][0]
        device, dtype, width = first.device, first.dtype, first.shape[1]
        maps, sizes = [], []
        for levels in groups:
            images = [m.permute(0, 2, 3, 1).flatten(1, 2).unbind() for m in levels]
            # Image by image, each level by level.
            maps += [cells for image in zip(*images, strict=True) for cells in image]
            sizes += [_sizes_of(levels)] * len(levels[0])
        centres = torch.cat([cell_centres(size, device) for size in sizes])
        centres = centres.to(torch.promote_types(dtype, torch.float32))
        counts = np.array(sizes).prod(axis=2)
        level = np.repeat(np.tile(np.arange(counts.shape[1]), len(sizes)), counts.flatten())
        of_level = level_embed.index_select(0, to_device(torch.from_numpy(level), device))
        position = sine_position(centres, width) + of_level
        packed = PackedLevels.of(sizes, device)
        return cls(torch.cat(maps), centres.to(dtype), position.to(dtype), packed, tuple(sizes))


def _sizes_of(levels: Sequence[Tensor]) -> SizesHw:
    return tuple((int(m.shape[-2]), int(m.shape[-1])) for m in levels)


@dataclass(frozen=True, slots=True)
class ReadCells:
    """Some cells of one level of packed images.

    Attributes:
        image: Image of each cell, int32, rising, shape (N,).
        token: Its place among all tokens, int64, shape (N,).
        cell: Its place among all cells of that level, int64, shape (N,).
    """

    image: Tensor
    token: Tensor
    cell: Tensor

    def on(self, device: torch.device) -> "ReadCells":
        """The same on a device; nothing waits for it.

        Args:
            device: Where the tokens are.

        Returns:
            The cells.
        """
        return ReadCells(*(to_device(t, device) for t in (self.image, self.token, self.cell)))


def cells_read(
    image: NDArray[np.int64],
    boxes_xyxy: NDArray[np.floating],
    sizes_hw: Sequence[SizesHw],
    level: int,
    stride: int,
) -> ReadCells:
    """Cells of a level that RoIAlign reads, up-sampling in between.

    How many there are decides what is computed. So this is found out on the CPU: asking a GPU would
    wait until it has done everything that it was asked before.

    Args:
        image: Image of each box, shape (R,).
        boxes_xyxy: In network input pixels, shape (R, 4).
        sizes_hw: Height and width of each level, for each image.
        level: Which level.
        stride: Input pixels per cell of it.

    Returns:
        The cells, on the CPU.
    """
    sizes = [size[level] for size in sizes_hw]
    low = np.floor(boxes_xyxy[:, :2] / stride) - _MARGIN
    end = np.ceil(boxes_xyxy[:, 2:] / stride) + _MARGIN + 1
    # Slices would count negative numbers from the other side.
    corners = np.concatenate((low, end), axis=1).clip(0, max(map(max, sizes))).astype(np.int64)
    read = [np.zeros(size, np.bool_) for size in sizes]
    for owner, (left, top, right, bottom) in zip(image.tolist(), corners.tolist(), strict=True):
        read[owner][top:bottom, left:right] = True
    places = [np.flatnonzero(one) for one in read]
    tokens = first_tokens(sizes_hw)[:, level]
    counts = np.prod(sizes, axis=1)
    cells = counts.cumsum() - counts

    def after(starts: NDArray[np.int64]) -> Tensor:
        shifted = [place + start for place, start in zip(places, starts, strict=True)]
        return torch.from_numpy(np.concatenate(shifted))

    owners = np.repeat(np.arange(len(places), dtype=np.int32), [len(p) for p in places])
    return ReadCells(torch.from_numpy(owners), after(tokens), after(cells))
