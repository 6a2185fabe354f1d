"""Images of different sizes as one sequence of tokens, and those of their cells that regions read.

A batch of COCO has images of six sizes. One pass over all tokens costs a GPU one start of each
operation instead of six; a network of this size is otherwise limited by these starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfdetr_cache.head.blocks.deformable import cell_centres
from mfdetr_cache.head.position import sine_position
from mfdetr_cache.packed_levels import PackedLevels, SizesHw

# Cells around a box, at the fused level, that bilinear up-sampling and RoIAlign may reach into:
# one each, and one for where a map's size is not a multiple of its stride.
_MARGIN = 3


@dataclass(frozen=True, slots=True)
class PackedImages:
    """The encoder levels of some groups of images, one image behind the other.

    Attributes:
        tokens: All tokens, shape (S, D).
        centres: Normalised centre of each token's cell, shape (S, 2).
        position: Position of each token, sine and level embedding, shape (S, D).
        levels: Whose the tokens are; every token is a query.
    """

    tokens: Tensor
    centres: Tensor
    position: Tensor
    levels: PackedLevels

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
        device, width = first.device, first.shape[1]
        tokens, centres, positions = [], [], []
        sizes: list[SizesHw] = []
        for group in groups:
            count = len(group[0])
            sizes_hw = tuple((int(m.shape[-2]), int(m.shape[-1])) for m in group)
            position = torch.cat(
                [
                    sine_position(s, width, device) + e
                    for s, e in zip(sizes_hw, level_embed, strict=True)
                ]
            )
            tokens.append(torch.cat([m.flatten(2).mT for m in group], dim=1).flatten(0, 1))
            centres.append(cell_centres(sizes_hw, device).repeat(count, 1))
            positions.append(position.repeat(count, 1))
            sizes += [sizes_hw] * count
        packed = PackedLevels.of(sizes, device)
        joined = (torch.cat(parts) for parts in (tokens, centres, positions))
        memory, middle, where = (t.to(first.dtype) for t in joined)
        return cls(memory, middle, where, packed)


@dataclass(frozen=True, slots=True)
class ReadCells:
    """Some cells of one level of packed images.

    Attributes:
        image: Image of each cell, rising, shape (N,).
        token: Its place among all tokens, shape (N,).
        cell: Its place among all cells of that level, shape (N,).
    """

    image: Tensor
    token: Tensor
    cell: Tensor


def cells_read(
    rois: Tensor, levels: PackedLevels, level: int, stride: int, largest_hw: tuple[int, int]
) -> ReadCells:
    """Cells of a level that RoIAlign reads, up-sampling in between.

    Args:
        rois: Index of the image, then x0, y0, x1, y1 in network input pixels, shape (R, 5).
        levels: Where the images' tokens are.
        level: Which level.
        stride: Input pixels per cell of it.
        largest_hw: No image has more rows or columns of them.

    Returns:
        The cells. Finding out how many there are waits for the device.
    """
    sizes = levels.sizes[:, level].long()
    bounds = rois[:, 1:] / stride
    low, high = bounds[:, :2].floor() - _MARGIN, bounds[:, 2:].ceil() + _MARGIN
    y, x = (torch.arange(side, device=rois.device) for side in largest_hw)
    across = (x >= low[:, :1]) & (x <= high[:, :1])
    down = (y >= low[:, 1:]) & (y <= high[:, 1:])
    inside = (down[:, :, None] & across[:, None]).to(rois.dtype)
    read = inside.new_zeros(len(sizes), *largest_hw).index_add(0, rois[:, 0].long(), inside) > 0
    read = read & (y[:, None] < sizes[:, :1, None]) & (x < sizes[:, 1:, None])
    image, row, column = read.nonzero().unbind(1)
    place = row * sizes[image, 1] + column
    counts = sizes.prod(1)
    first = counts.cumsum(0) - counts
    return ReadCells(image, levels.starts[image, level] + place, first[image] + place)
