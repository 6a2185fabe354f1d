"""FocalNet as FocalNet-DINO uses it: convolutional embedding, post-norm, layer scale."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.detectors.official.stages import Embed, GeluMlp, Stage, StagedBackbone


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
        # cuDNN's kernel for these takes half of the time of the whole detector.
        with torch.backends.cudnn.flags(enabled=False):
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


class _Downsample(Embed):
    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 3, 1, 2))


class FocalNet(StagedBackbone):
    """``width`` are the channels and ``kernels`` the focal kernel sizes of the first stage."""

    def __init__(
        self, width: int, depths: tuple[int, ...], kernels: tuple[int, ...], first_stage: int
    ) -> None:
        def stage(index: int) -> Stage:
            wide = width << index
            blocks = [FocalBlock(wide, kernels) for _ in range(depths[index])]
            return Stage(blocks, _Downsample(wide, 2 * wide, 3, 2, 1) if index < 3 else None)

        super().__init__(Embed(3, width, 7, 4, 2), map(stage, range(4)), width, first_stage)
