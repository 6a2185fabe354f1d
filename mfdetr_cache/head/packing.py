"""Images of different sizes as one sequence of tokens.

A batch of COCO has images of six sizes. One pass over all tokens costs a GPU one start of each
operation instead of six; a network of this size is otherwise limited by these starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mfdetr_cache.head.blocks.deformable import cell_centres
from mfdetr_cache.head.position import SineEncoding, sine_position
from mfdetr_cache.ops.devices import to_device
from mfdetr_cache.ops.packed_levels import PackedLevels, SizesHw


@dataclass(frozen=True, slots=True)
class PackedImages:
    """The encoder levels of several groups of images, one image after the other.

    Attributes:
        tokens: All tokens, shape (S, D).
        centres: Normalised centre of each token's cell, shape (S, 2).
        position: Sine and level embedding of each token, shape (S, D).
        levels: Where the levels lie in the sequence; every token is a query.
        sizes_hw: Height and width of each level, for each image.
    """

    tokens: Tensor
    centres: Tensor
    position: Tensor
    levels: PackedLevels
    sizes_hw: tuple[SizesHw, ...]

    @classmethod
    def of(
        cls, groups: Sequence[Sequence[Tensor]], level_embed: Tensor, sine: SineEncoding
    ) -> "PackedImages":
        """Pack the levels of groups of equal-sized images, finest first, each (B, D, h, w).

        ``level_embed``, shape (L, D), is added to the sine position of each level's tokens.
        """
        first = groups[0][0]
        device, dtype, width = first.device, first.dtype, first.shape[1]
        maps, sizes = [], []
        for levels in groups:
            images = [m.permute(0, 2, 3, 1).flatten(1, 2).unbind() for m in levels]
            # Image by image, each level by level.
            maps += [cells for image in zip(*images, strict=True) for cells in image]
            sizes += [tuple((int(m.shape[-2]), int(m.shape[-1])) for m in levels)] * len(levels[0])
        precise = torch.promote_types(dtype, torch.float32)
        centres = torch.cat([cell_centres(size, device) for size in sizes]).to(precise)
        shifted = centres
        if sine.shift:
            cells = [cell_centres(size, device, sine.shift) for size in sizes]
            shifted = torch.cat(cells).to(precise)
        counts = np.array(sizes).prod(axis=2)
        level = np.repeat(np.tile(np.arange(counts.shape[1]), len(sizes)), counts.flatten())
        of_level = level_embed.index_select(0, to_device(torch.from_numpy(level), device))
        position = sine_position(shifted, width, sine.temperature) + of_level
        packed = PackedLevels.of(sizes, device)
        return cls(torch.cat(maps), centres.to(dtype), position.to(dtype), packed, tuple(sizes))
