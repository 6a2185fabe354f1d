"""Swin transformer as detectors use it: any size, windows padded inside, parameters as published.

torchvision's has the same layers, but leaves out the shift where a map is not larger than a
window, which the detectors' code does not; small maps then differ.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.detectors.official.stages import Embed, GeluMlp, Stage, StagedBackbone


class WindowAttention(nn.Module):
    """Multi-head attention inside windows with relative position bias."""

    relative_position_index: Tensor

    def __init__(self, width: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        steps = torch.arange(window)
        row, col = (g.flatten() for g in torch.meshgrid(steps, steps, indexing="ij"))
        rows, cols = row[:, None] - row + window - 1, col[:, None] - col + window - 1
        self.register_buffer("relative_position_index", rows * (2 * window - 1) + cols)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over (B * n, window^2, C), same shape out.

        ``mask``, (n, window^2, window^2), is added to the logits of each of the n windows.
        """
        count = windows.shape[0]
        qkv = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        added = bias[None]
        if mask is not None:
            added = (bias[None] + mask[:, None]).repeat(count // len(mask), 1, 1, 1)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=added)
        result: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return result


class SwinBlock(nn.Module):
    """Pre-norm block: attention in windows shifted by ``shift`` cells, then an MLP."""

    def __init__(self, width: int, window: int, heads: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, window, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = GeluMlp(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Shape (B, h, w, C) to the same."""
        maps = maps + self._attend(self.norm1(maps))
        refined: Tensor = maps + self.mlp(self.norm2(maps))
        return refined

    def _attend(self, maps: Tensor) -> Tensor:
        batch, height, width, channels = maps.shape
        side, shift = self.window, self.shift
        maps = functional.pad(maps, (0, 0, 0, -width % side, 0, -height % side))
        rows, cols = maps.shape[1] // side, maps.shape[2] // side
        mask = None
        if shift:
            maps = maps.roll((-shift, -shift), dims=(1, 2))
            mask = self._mask((rows, cols), maps)
        windows = self._split(maps)
        mixed = self.attn(windows, mask).view(batch, rows, cols, side, side, channels)
        mixed = mixed.permute(0, 1, 3, 2, 4, 5).reshape(batch, rows * side, cols * side, channels)
        if shift:
            mixed = mixed.roll((shift, shift), dims=(1, 2))
        attended: Tensor = mixed[:, :height, :width]
        return attended

    def _split(self, maps: Tensor) -> Tensor:
        side = self.window
        cut = maps.unflatten(1, (-1, side)).unflatten(3, (-1, side)).permute(0, 1, 3, 2, 4, 5)
        windows: Tensor = cut.reshape(-1, side * side, maps.shape[-1])
        return windows

    def _mask(self, windows: tuple[int, int], like: Tensor) -> Tensor:
        """-100 between cells that the shift brought together from opposite sides."""
        side, shift = self.window, self.shift
        region = like.new_zeros((1, windows[0] * side, windows[1] * side, 1))
        bounds = (slice(0, -side), slice(-side, -shift), slice(-shift, None))
        for number, (row, col) in enumerate((r, c) for r in bounds for c in bounds):
            region[:, row, col] = number
        cells = self._split(region)[..., 0]
        apart: Tensor = (cells[:, :, None] != cells[:, None, :]).to(like.dtype) * -100.0
        return apart


class PatchMerging(nn.Module):
    """Merge 2 x 2 cells of ``width`` channels into one of twice as many.

    The four values of a channel stand together where ``by_channel``, else the channels of a cell.
    """

    def __init__(self, width: int, *, by_channel: bool = False) -> None:
        super().__init__()
        self.by_channel = by_channel
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, h, w, C) to (B, ceil(h / 2), ceil(w / 2), 2C); odd sizes are padded."""
        maps = functional.pad(maps, (0, 0, 0, maps.shape[2] % 2, 0, maps.shape[1] % 2))
        if self.by_channel:
            parts = [maps[:, row::2, col::2] for row in (0, 1) for col in (0, 1)]
            cells = torch.stack(parts, dim=-1).flatten(3)
        else:
            parts = [maps[:, row::2, col::2] for col in (0, 1) for row in (0, 1)]
            cells = torch.cat(parts, dim=-1)
        merged: Tensor = self.reduction(self.norm(cells))
        return merged


class Swin(StagedBackbone):
    """Swin transformer; the outputs are the residual stream before merging."""

    def __init__(
        self,
        width: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int,
        first_stage: int,
        *,
        by_channel: bool = False,
    ) -> None:
        def stage(index: int) -> Stage:
            wide, shifts = width << index, (0, window // 2)
            blocks = [
                SwinBlock(wide, window, heads[index], shifts[i % 2]) for i in range(depths[index])
            ]
            return Stage(blocks, PatchMerging(wide, by_channel=by_channel) if index < 3 else None)

        super().__init__(Embed(3, width, 4, 4, 0), map(stage, range(4)), width, first_stage)
