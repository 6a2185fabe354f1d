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
        sizes_hw = tuple((int(m.shape[-2]), int(m.shape[-1])) for m in levels)
        position = torch.cat(
            [
                sine_position(size, width, device) + level_embed[level]
                for level, size in enumerate(sizes_hw)
            ]
        )
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in levels], dim=1)
        centres = cell_centres(sizes_hw, device)
        return cls(tokens, centres.to(dtype), position.to(dtype), sizes_hw)


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
        lined_up = [LevelTokens.of(levels, level_embed) for levels in groups]
        counts = [len(one.tokens) for one in lined_up]
        pairs = list(zip(lined_up, counts, strict=True))
        sizes = [one.sizes_hw for one, count in pairs for _ in range(count)]
        return cls(
            torch.cat([one.tokens.flatten(0, 1) for one in lined_up]),
            torch.cat([one.centres.repeat(count, 1) for one, count in pairs]),
            torch.cat([one.position.repeat(count, 1) for one, count in pairs]),
            PackedLevels.of(sizes, lined_up[0].tokens.device),
        )


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
