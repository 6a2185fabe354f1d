"""Image feature encoder F_e: refines the detector's encoder maps (Eq. 6-8, Tables 2 and 15)."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mfdetr_cache.head.blocks.convnext import ConvNeXtBlock, init_convnext
from mfdetr_cache.head.blocks.deformable import DeformableLayer
from mfdetr_cache.head.blocks.swin import SwinBlock
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.packing import LevelTokens, PackedImages, ReadCells, cells_read

IMAGE_WINDOW = 14


class DeformableImageEncoder(nn.Module):
    """Deformable layers over all levels; gives back the one level that is fused.

    The last layer refines only that level's tokens, and in :meth:`refine_read` only those that some
    region reads: the others would be computed and thrown away. Setting ``every_token`` computes
    them all the same, which changes nothing in the result; the paper's MAC column counts them.

    Args:
        width: Channels of all levels.
        num_levels: Levels, finest first.
        num_layers: Layers.
        fused_level: Index of the level that is given back.
        level_embed: The detector's frozen level embedding, shape (L, D); None learns one.
    """

    level_embed: Tensor

    def __init__(
        self,
        width: int,
        num_levels: int,
        num_layers: int,
        fused_level: int,
        level_embed: Tensor | None,
    ) -> None:
        super().__init__()
        self.fused_level = fused_level
        self.every_token = False
        self.layers = nn.ModuleList(DeformableLayer(width, num_levels) for _ in range(num_layers))
        if level_embed is not None:
            self.register_buffer("level_embed", level_embed.clone())
        elif num_layers:
            self.level_embed = nn.Parameter(torch.empty(num_levels, width))
            nn.init.normal_(self.level_embed, std=0.02)

    @property
    def computes_all(self) -> bool:
        """Whether nothing is saved by :meth:`refine_read`: no layer, or every token is wanted."""
        return self.every_token or not len(self.layers)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Refine one level with the help of all.

        Args:
            levels: Maps, finest first, each (B, D, h, w).

        Returns:
            The refined level, shape (B, D, h, w).
        """
        if not len(self.layers):
            return levels[self.fused_level]
        lined_up = LevelTokens.of(levels, self.level_embed)
        memory, centres, position = lined_up.tokens, lined_up.centres, lined_up.position
        sizes_hw = lined_up.sizes_hw
        counts = [h * w for h, w in sizes_hw]
        first = sum(counts[: self.fused_level])
        wanted = slice(first, first + counts[self.fused_level])
        for layer in self.layers[:-1]:
            memory = layer(memory, position, centres, memory, sizes_hw)
        chosen = slice(None) if self.every_token else wanted
        tokens: Tensor = self.layers[-1](
            memory[:, chosen], position[chosen], centres[chosen], memory, sizes_hw
        )
        tokens = tokens[:, wanted] if self.every_token else tokens
        refined: Tensor = tokens.transpose(1, 2).unflatten(2, sizes_hw[self.fused_level])
        return refined

    def refine_read(
        self,
        groups: Sequence[Sequence[Tensor]],
        image: NDArray[np.int64],
        boxes_xyxy: NDArray[np.floating],
        stride: int,
    ) -> tuple[Tensor, ReadCells]:
        """Refine those cells of one level that regions read, of images of any sizes at once.

        Args:
            groups: For each group of images of one size their levels, as :meth:`forward` takes.
            image: Image of each region, counted over all groups, shape (R,).
            boxes_xyxy: Its box in network input pixels, shape (R, 4).
            stride: Input pixels per cell of the level.

        Returns:
            The refined cells, shape (N, D), and where they are.
        """
        packed = PackedImages.of(groups, self.level_embed)
        memory = packed.tokens
        for layer in self.layers[:-1]:
            memory = layer(memory, packed.position, packed.centres, memory, packed.levels)
        cells = cells_read(image, boxes_xyxy, packed.sizes_hw, self.fused_level, stride)
        read = cells.on(memory.device)
        refined: Tensor = self.layers[-1](
            memory[read.token],
            packed.position[read.token],
            packed.centres[read.token],
            memory,
            packed.levels.for_queries(read.image),
        )
        return refined, read


class SingleLevelImageEncoder(nn.Module):
    """Swin or ConvNeXt blocks over the fused level alone, as the paper's MAC counts show.

    Args:
        blocks: Blocks over channels-last maps.
        fused_level: Index of the level that is refined and given back.
    """

    def __init__(self, blocks: list[nn.Module], fused_level: int) -> None:
        super().__init__()
        self.fused_level = fused_level
        self.layers = nn.ModuleList(blocks)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Refine one level.

        Args:
            levels: Maps, finest first, each (B, D, h, w).

        Returns:
            The refined level, shape (B, D, h, w).
        """
        maps = levels[self.fused_level].permute(0, 2, 3, 1)
        for layer in self.layers:
            maps = layer(maps)
        return maps.permute(0, 3, 1, 2)


def build_image_encoder(
    config: HeadConfig, width: int, num_levels: int, fused_level: int, level_embed: Tensor | None
) -> nn.Module:
    """The image encoder a configuration asks for.

    Args:
        config: The head's configuration.
        width: Channels of all levels.
        num_levels: Levels, finest first.
        fused_level: Index of the level that is fused.
        level_embed: The detector's frozen level embedding; None learns one.

    Returns:
        A module from a list of levels to the fused level.
    """
    count = config.image_layers
    if config.image_block == "deformable":
        return DeformableImageEncoder(width, num_levels, count, fused_level, level_embed)
    return SingleLevelImageEncoder(
        plain_blocks(config.image_block, width, count, IMAGE_WINDOW), fused_level
    )


def plain_blocks(kind: str, width: int, count: int, window: int) -> list[nn.Module]:
    """Swin or ConvNeXt blocks.

    Args:
        kind: ``swin`` or ``convnext``.
        width: Channels.
        count: How many.
        window: Window side for Swin.

    Returns:
        The blocks, initialised.
    """
    if kind == "swin":
        return [SwinBlock(width, window, shifted=bool(i % 2)) for i in range(count)]
    blocks = [ConvNeXtBlock(width) for _ in range(count)]
    for block in blocks:
        init_convnext(block)
    return list(blocks)
