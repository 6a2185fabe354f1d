"""Image feature encoder F_e: refines the detector's encoder maps (Eq. 6-8, Tables 2 and 15)."""

import torch
from torch import Tensor, nn

from mfdetr_cache.head.blocks.deformable import DeformableLayer, cell_centres
from mfdetr_cache.head.position import SineEncoding, sine_position


class DeformableImageEncoder(nn.Module):
    """Deformable layers over all levels (Eq. 6); returns the one level that is fused.

    The last layer refines only that level's tokens: the others would be computed and thrown away.
    Setting ``every_token`` computes them all the same, which changes nothing in the result; the
    paper's MAC column counts them.

    Args:
        num_levels: Levels, finest first.
        fused_level: Index of the level that is returned.
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
        sine: SineEncoding | None = None,
    ) -> None:
        super().__init__()
        self.sine = sine or SineEncoding()
        self.fused_level = fused_level
        self.every_token = False
        self.layers = nn.ModuleList(DeformableLayer(width, num_levels) for _ in range(num_layers))
        if level_embed is not None:
            self.register_buffer("level_embed", level_embed.clone())
        elif num_layers:
            self.level_embed = nn.Parameter(torch.empty(num_levels, width))
            nn.init.normal_(self.level_embed, std=0.02)

    @property
    def omits_tokens(self) -> bool:
        """Whether the last layer may leave out tokens that nothing reads."""
        return bool(self.layers) and not self.every_token

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Refine one of the levels (finest first, (B, D, h, w)) with attention to all."""
        if not self.layers:
            return levels[self.fused_level]
        # All cells of all levels as one sequence of tokens, level by level.
        sizes_hw = tuple((int(m.shape[-2]), int(m.shape[-1])) for m in levels)
        memory = torch.cat([m.flatten(2).transpose(1, 2) for m in levels], dim=1)
        dtype, precise = memory.dtype, torch.promote_types(memory.dtype, torch.float32)
        centres = cell_centres(sizes_hw, memory.device).to(precise)
        # A token's position: sine encoding of its cell, and the embedding of its level.
        counts = [h * w for h, w in sizes_hw]
        rows = zip(self.level_embed, counts, strict=True)
        of_level = torch.cat([row.expand(count, -1) for row, count in rows])
        shifted = cell_centres(sizes_hw, memory.device, self.sine.shift).to(precise)
        sine = sine_position(shifted, memory.shape[-1], self.sine.temperature)
        position = (sine + of_level).to(dtype)
        centres = centres.to(dtype)
        for layer in self.layers[:-1]:
            memory = layer(memory, position, centres, memory, sizes_hw)
        first = sum(counts[: self.fused_level])
        fused = slice(first, first + counts[self.fused_level])
        chosen = slice(None) if self.every_token else fused
        tokens = self.layers[-1](
            memory[:, chosen], position[chosen], centres[chosen], memory, sizes_hw
        )
        tokens = tokens[:, fused] if self.every_token else tokens
        refined: Tensor = tokens.transpose(1, 2).unflatten(2, sizes_hw[self.fused_level])
        return refined


class SingleLevelImageEncoder(nn.Module):
    """Swin (Eq. 7) or ConvNeXt blocks (Eq. 8) over the fused level alone, channels last.

    The paper's MAC counts show that these do not see the other levels.
    """

    def __init__(self, blocks: list[nn.Module], fused_level: int) -> None:
        super().__init__()
        self.fused_level = fused_level
        self.layers = nn.ModuleList(blocks)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Refine one of the levels (finest first, (B, D, h, w))."""
        maps = levels[self.fused_level].permute(0, 2, 3, 1)
        for layer in self.layers:
            maps = layer(maps)
        return maps.permute(0, 3, 1, 2)
