"""What Swin and FocalNet have in common: a strided stem and four stages of blocks."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional


class GeluMlp(nn.Module):
    """Linear to four times the width, exact GELU, linear back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, values: Tensor) -> Tensor:
        """Shape (..., C) to the same."""
        result: Tensor = self.fc2(functional.gelu(self.fc1(values)))
        return result


class Embed(nn.Module):
    """A strided convolution and a norm."""

    def __init__(self, in_width: int, width: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_width, width, kernel, stride, padding)
        self.norm = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to channels last, (B, h, w, C')."""
        result: Tensor = self.norm(self.proj(maps).permute(0, 2, 3, 1))
        return result


class Stage(nn.Module):
    """Blocks of one resolution over channels-last maps, and the way to the next."""

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's output as (B, C, h, w), and what the next stage begins with."""
        for block in self.blocks:
            maps = block(maps)
        output = maps.permute(0, 3, 1, 2)
        return output, maps if self.downsample is None else self.downsample(maps)


class StagedBackbone(nn.Module):
    """Four stages behind a stem of stride 4, with norms for the outputs from ``first_stage`` on."""

    def __init__(
        self, patch_embed: Embed, stages: Iterable[Stage], width: int, first_stage: int
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.layers = nn.ModuleList(stages)
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
