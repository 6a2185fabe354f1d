"""FocalNet as FocalNet-DINO uses it: convolutional embedding, post-norm, layer scale."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.detectors.official.mlp import GeluMlp


class FocalModulation(nn.Module):
    """Query times a modulator of depth-wise convolutions, one kernel size per focal level."""

    def __init__(self, width: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.width, self.levels = width, len(kernels)
        self.divides = False
        self.f = nn.Linear(width, 2 * width + self.levels + 1)
        self.h = nn.Conv2d(width, width, 1)
        self.proj = nn.Linear(width, width)
        self.focal_layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, k, padding=k // 2, groups=width, bias=False), nn.GELU()
            )
            for k in kernels
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Modulate (B, h, w, C)."""
        mixed = self.f(maps).permute(0, 3, 1, 2)
        query, context, gates = mixed.split((self.width, self.width, self.levels + 1), dim=1)
        gathered = torch.zeros_like(context)
        for level, layer in enumerate(self.focal_layers):
            context = layer(context)
            gathered = gathered + context * gates[:, level : level + 1]
        whole = functional.gelu(context.mean(dim=(2, 3), keepdim=True))
        gathered = gathered + whole * gates[:, self.levels :]
        if self.divides:
            gathered = gathered / (self.levels + 1)
        modulated: Tensor = self.proj((query * self.h(gathered)).permute(0, 2, 3, 1))
        return modulated


class FocalBlock(nn.Module):
    """Post-norm block with layer scale; one kernel size per focal level."""

    def __init__(self, width: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.modulation = FocalModulation(width, kernels)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = GeluMlp(width)
        self.norm2 = nn.LayerNorm(width)
        self.gamma_1 = nn.Parameter(torch.full((width,), 1e-4))
        self.gamma_2 = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, maps: Tensor) -> Tensor:
        """Shape (B, h, w, C) to the same."""
        maps = maps + self.gamma_1 * self.norm1(self.modulation(maps))
        refined: Tensor = maps + self.gamma_2 * self.norm2(self.mlp(maps))
        return refined


class _Embed(nn.Module):
    """A strided convolution and a norm: the stem, and the way between stages."""

    def __init__(self, in_width: int, width: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_width, width, kernel, stride, padding)
        self.norm = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        result: Tensor = self.norm(self.proj(maps).permute(0, 2, 3, 1))
        return result


class _Stage(nn.Module):
    """Blocks of one resolution, and the way to the next."""

    def __init__(self, width: int, depth: int, kernels: tuple[int, ...], *, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FocalBlock(width, kernels) for _ in range(depth))
        self.downsample: nn.Module | None = None if last else _Embed(width, 2 * width, 3, 2, 1)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's output as (B, C, h, w), and what the next stage begins with."""
        for block in self.blocks:
            maps = block(maps)
        output = maps.permute(0, 3, 1, 2)
        if self.downsample is not None:
            maps = self.downsample(output)
        return output, maps


class FocalNet(nn.Module):
    """FocalNet with norms for the outputs from ``first_stage`` on.

    ``width`` are the channels and ``kernels`` the focal kernel sizes of the first stage.
    """

    def __init__(
        self, width: int, depths: tuple[int, ...], kernels: tuple[int, ...], first_stage: int
    ) -> None:
        super().__init__()
        self.patch_embed = _Embed(3, width, 7, 4, 2)
        self.layers = nn.ModuleList(
            _Stage(width << i, depths[i], kernels, last=i == 3) for i in range(4)
        )
        for index in range(first_stage, 4):
            self.add_module(f"norm{index}", nn.LayerNorm(width << index))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) at strides 4, 8, 16, 32, before down-sampling, without output norm.

        The input (B, 3, H, W) is padded to a multiple of four.
        """
        height, width = pixel_values.shape[-2:]
        maps = self.patch_embed(functional.pad(pixel_values, (0, -width % 4, 0, -height % 4)))
        stages = []
        for stage in self.layers:
            output, maps = stage(maps)
            stages.append(output)
        return stages
