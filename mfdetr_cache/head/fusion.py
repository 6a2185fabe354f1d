"""Feature fusion: the encoder map and the backbone's first map become one (Eq. 1, 5, 14)."""

from torch import Tensor, nn
from torch.nn import functional


def group_norm(width: int) -> nn.GroupNorm:
    """Group norm with 32 groups, or as many as divide the width.

    Args:
        width: Channels.

    Returns:
        The module.
    """
    return nn.GroupNorm(max(g for g in range(1, 33) if width % g == 0), width)


class Projection(nn.Sequential):
    """A 1x1 convolution and a group norm: the neck of Eq. 14, and the way in for other widths.

    Args:
        in_width: Channels of the map.
        out_width: Channels wanted.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        conv = nn.Conv2d(in_width, out_width, 1)
        nn.init.xavier_uniform_(conv.weight)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        super().__init__(conv, group_norm(out_width))


class FeatureFusion(nn.Module):
    """F = neck(C1) + upsample(E'), at C1's resolution (Eq. 5 and 14).

    Args:
        neck: Brings C1 to the encoder's width; None adds C1 as it is (Eq. 1).
    """

    def __init__(self, neck: nn.Module | None) -> None:
        super().__init__()
        self.neck = neck

    def forward(
        self, c1: Tensor | None, refined: Tensor, size_hw: tuple[int, int] | None = None
    ) -> Tensor:
        """Fuse the maps of equal-sized images.

        Args:
            c1: Backbone stage-1 map, shape (B, C1, H/4, W/4); None where there is none.
            refined: Refined encoder level, shape (B, D, h, w).
            size_hw: Height and width of the result without C1; None keeps those of ``refined``.

        Returns:
            The fused map, at the resolution of C1 where there is one.
        """
        if c1 is not None:
            size_hw = (int(c1.shape[-2]), int(c1.shape[-1]))
        if size_hw is not None and tuple(refined.shape[-2:]) != size_hw:
            refined = functional.interpolate(
                refined, size=size_hw, mode="bilinear", align_corners=False
            )
        if c1 is None:
            return refined
        fused: Tensor = (self.neck(c1) if self.neck is not None else c1) + refined
        return fused
