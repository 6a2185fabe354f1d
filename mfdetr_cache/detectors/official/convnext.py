"""ConvNeXt as detrex's DINO uses it: sides that are no multiple of a stride are cut."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.convnext import LayerNorm2d

_EPS = 1e-6


class _Block(nn.Module):
    """Depth-wise convolution, norm and MLP with layer scale, on a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, maps: Tensor) -> Tensor:
        """Shape (B, C, h, w) to the same."""
        mixed = self.norm(self.dwconv(maps).permute(0, 2, 3, 1))
        mixed = self.gamma * self.pwconv2(functional.gelu(self.pwconv1(mixed)))
        refined: Tensor = maps + mixed.permute(0, 3, 1, 2)
        return refined


class ConvNeXt(nn.Module):
    """ConvNeXt with norms for the outputs from ``first_stage`` on."""

    def __init__(self, width: int, depths: tuple[int, ...], first_stage: int) -> None:
        super().__init__()
        widths = [width << i for i in range(4)]
        stem = nn.Sequential(nn.Conv2d(3, width, 4, 4), LayerNorm2d(width, eps=_EPS))
        between = [
            nn.Sequential(LayerNorm2d(w, eps=_EPS), nn.Conv2d(w, 2 * w, 2, 2)) for w in widths[:3]
        ]
        self.downsample_layers = nn.ModuleList([stem, *between])
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Block(w) for _ in range(depth)))
            for w, depth in zip(widths, depths, strict=True)
        )
        for index in range(first_stage, 4):
            self.add_module(f"norm{index}", nn.LayerNorm(widths[index], eps=_EPS))

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) at strides 4, 8, 16, 32, without output norm."""
        maps, outputs = pixel_values, []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            maps = stage(downsample(maps))
            outputs.append(maps)
        return outputs
