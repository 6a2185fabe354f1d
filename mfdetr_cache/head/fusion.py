"""Feature fusion: refined encoder level and the backbone's first map added (Eq. 1, 5, 14)."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.types import MapSpec


class Projection(nn.Sequential):
    """A 1x1 convolution and group norm: the neck of Eq. 14, also for levels of another width."""

    def __init__(self, in_width: int, out_width: int) -> None:
        conv = nn.Conv2d(in_width, out_width, 1)
        nn.init.xavier_uniform_(conv.weight)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        # 32 groups, or as many as divide the width.
        groups = max(g for g in range(1, 33) if out_width % g == 0)
        super().__init__(conv, nn.GroupNorm(groups, out_width))


class LevelProjections(nn.ModuleDict):
    """Projects backbone maps, and encoder levels of another width, to the encoder's width D."""

    def __init__(self, levels: Sequence[MapSpec], width: int) -> None:
        others = [m for m in levels if m.role != "encoder" or m.channels != width]
        super().__init__({m.name: Projection(m.channels, width) for m in others})
        self.names = [m.name for m in levels]

    def forward(self, maps: Mapping[str, Tensor]) -> list[Tensor]:
        """Select and project the levels, finest first, each (B, D, h, w)."""
        return [self[name](maps[name]) if name in self else maps[name] for name in self.names]


class FeatureFusion(nn.Module):
    """F = neck(C1) + upsample(E'), at C1's resolution (Eq. 5 and 14).

    Args:
        neck: Brings C1 to the encoder's width; None adds C1 as it is (Eq. 1).
        upsample: Without C1, bring E' to stride 4 all the same (Table 1).
    """

    def __init__(self, neck: nn.Module | None, *, upsample: bool) -> None:
        super().__init__()
        self.neck = neck
        self.upsample = upsample

    def forward(self, c1: Tensor | None, refined: Tensor, input_hw: tuple[int, int]) -> Tensor:
        """Fuse the maps of equal-sized images, at the resolution of C1 where there is one.

        C1 is the stride-4 map, (B, C1, H/4, W/4), ``refined`` the encoder level E', (B, D,
        h, w), both of a network input of ``input_hw`` pixels.
        """
        if c1 is not None:
            size_hw = (int(c1.shape[-2]), int(c1.shape[-1]))
            projected = self.neck(c1) if self.neck is not None else c1
            fused: Tensor = projected + resize_map(refined, size_hw)
            return fused
        if self.upsample:
            return resize_map(refined, (-(-input_hw[0] // 4), -(-input_hw[1] // 4)))
        return refined


def resize_map(maps: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Bilinear resizing of maps (B, C, h, w), with cell centres aligned rather than corners."""
    if tuple(maps.shape[-2:]) == size_hw:
        return maps
    return functional.interpolate(maps, size=size_hw, mode="bilinear", align_corners=False)
