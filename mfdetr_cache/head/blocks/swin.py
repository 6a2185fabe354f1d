"""Swin block (Eq. 7): attention inside windows, shifted in every other block, then an FFN."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.head.blocks.deformable import num_heads_for


class SwinBlock(nn.Module):
    """Pre-norm windowed attention with relative position bias, over a channels-last map.

    ``window`` is the side of a window in cells; ``shifted`` shifts the windows by half of it.
    """

    relative_index: Tensor

    def __init__(self, width: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.num_heads = num_heads_for(width)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.position_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, self.num_heads))
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        steps = torch.arange(window)
        row, col = (g.flatten() for g in torch.meshgrid(steps, steps, indexing="ij"))
        index = (
            (row[:, None] - row + window - 1) * (2 * window - 1) + col[:, None] - col + window - 1
        )
        self.register_buffer("relative_index", index, persistent=False)
        nn.init.trunc_normal_(self.position_bias, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Refine maps (B, h, w, D), padded to whole windows; padding is never attended to."""
        maps = maps + self._attend(self.norm1(maps))
        refined: Tensor = maps + self.linear2(functional.gelu(self.linear1(self.norm2(maps))))
        return refined

    def _attend(self, maps: Tensor) -> Tensor:
        batch, height, width, channels = maps.shape
        side, heads = self.window, self.num_heads
        pad_h, pad_w = -height % side, -width % side
        # Whole windows, shifted; attention stays between cells of the same region.
        padded = functional.pad(maps, (0, 0, 0, pad_w, 0, pad_h))
        full_h, full_w = height + pad_h, width + pad_w
        region = self._regions((height, width), (full_h, full_w), maps.device)
        if self.shift:
            padded = padded.roll((-self.shift, -self.shift), dims=(1, 2))
            region = region.roll((-self.shift, -self.shift), dims=(0, 1))
        windows = self._split(padded)  # (B * n, side * side, D)
        regions = self._split(region[None, ..., None])[..., 0]  # (n, side * side)
        allowed = regions[:, :, None] == regions[:, None, :]
        # One mask for both: the relative position bias, and the lowest number between regions.
        bias = self.position_bias[self.relative_index].permute(2, 0, 1)  # (H, side^2, side^2)
        minus = torch.finfo(bias.dtype).min
        mask = bias[None].masked_fill(~allowed[:, None], minus)  # (n, H, ., .)
        query, key, value = (
            t.squeeze(0)
            for t in self.qkv(windows).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).split(1)
        )
        mask = mask.repeat(batch, 1, 1, 1).to(query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))
        # Windows back to a map, shifted back, without the padding.
        rows, cols = full_h // side, full_w // side
        merged = mixed.view(batch, rows, cols, side, side, channels).permute(0, 1, 3, 2, 4, 5)
        merged = merged.reshape(batch, full_h, full_w, channels)
        if self.shift:
            merged = merged.roll((self.shift, self.shift), dims=(1, 2))
        attended: Tensor = merged[:, :height, :width]
        return attended

    def _split(self, maps: Tensor) -> Tensor:
        """From maps (B, h, w, D) to windows (B * n, window^2, D)."""
        batch, height, width, channels = maps.shape
        side = self.window
        cut = maps.view(batch, height // side, side, width // side, side, channels)
        return cut.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, channels)

    def _regions(
        self, size_hw: tuple[int, int], full_hw: tuple[int, int], device: torch.device
    ) -> Tensor:
        """Number of the region each cell belongs to.

        After the shift, a window at the border holds cells from opposite sides of the map; those
        are different regions, and padding is a region of its own.
        """
        row = torch.zeros(full_hw, dtype=torch.long, device=device)
        if self.shift:
            row[: self.shift] += 1
            row[:, : self.shift] += 2
        row[size_hw[0] :] = 4
        row[:, size_hw[1] :] = 4
        return row
