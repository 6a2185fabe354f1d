"""Values of maps between their cells."""

from torch import Tensor
from torch.nn import functional


def bilinear_at(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps at normalised points.

    Args:
        maps: Shape (R, C, h, w).
        points: x and y in [0, 1] over each map, shape (R, N, 2).

    Returns:
        Shape (R, C, N). Outside the outermost cell centres values are constant.
    """
    sampled = functional.grid_sample(
        maps,
        (2 * points - 1)[:, :, None].to(maps.dtype),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled[..., 0]
