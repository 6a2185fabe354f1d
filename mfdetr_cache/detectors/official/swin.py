"""Swin transformer as detectors use it: any size, windows padded inside, parameters as published.

torchvision's has the same layers, but leaves out the shift where a map is not larger than a
window, which the detectors' code does not; small maps then differ.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.detectors.official.mlp import GeluMlp


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


class _Stage(nn.Module):
    """Blocks of one resolution, and the way to the next."""

    def __init__(
        self, width: int, depth: int, heads: int, window: int, *, last: bool, by_channel: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(width, window, heads, window // 2 if i % 2 else 0) for i in range(depth)
        )
        self.downsample: nn.Module | None = None
        if not last:
            self.downsample = PatchMerging(width, by_channel=by_channel)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's output as (B, C, h, w), and what the next stage begins with."""
        for block in self.blocks:
            maps = block(maps)
        output = maps.permute(0, 3, 1, 2)
        if self.downsample is not None:
            maps = self.downsample(maps)
        return output, maps


class _PatchEmbed(nn.Module):
    """4 x 4 patches and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        height, width = pixel_values.shape[-2:]
        padded = functional.pad(pixel_values, (0, -width % 4, 0, -height % 4))
        result: Tensor = self.norm(self.proj(padded).permute(0, 2, 3, 1))
        return result


class Swin(nn.Module):
    """Swin transformer with norms for the outputs from ``first_stage`` on."""

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
        super().__init__()
        self.patch_embed = _PatchEmbed(width)
        self.layers = nn.ModuleList(
            _Stage(width << i, depths[i], heads[i], window, last=i == 3, by_channel=by_channel)
            for i in range(4)
        )
        for index in range(first_stage, 4):
            self.add_module(f"norm{index}", nn.LayerNorm(width << index))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """The residual stream of each stage before merging, without norm.

        Maps (B, C, h, w) at strides 4, 8, 16, 32.
        """
        maps = self.patch_embed(pixel_values)
        stages = []
        for stage in self.layers:
            output, maps = stage(maps)
            stages.append(output)
        return stages
