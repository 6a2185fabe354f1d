"""Points at which masks are supervised: many candidates, the least certain kept (PointRend)."""

import torch
from torch import Tensor

from mfdetr_cache.ops.points import bilinear_at


def sample_at(grids: Tensor, points: Tensor) -> Tensor:
    """Bilinear values (R, N) of grids (R, h, w) at points (R, N, 2), as :func:`bilinear_at`."""
    return bilinear_at(grids[:, None], points)[:, 0]


def uncertain_points(
    mask_logits: Tensor,
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
    generator: torch.Generator,
    share: tuple[int, int] | None = None,
) -> Tensor:
    """Points where a mask is least certain, filled up with uniform ones (section 3.5).

    Args:
        mask_logits: Shape (R, h, w).
        num_points: Points N per mask.
        oversample_ratio: Uniform candidates per point (k of the paper).
        importance_sample_ratio: Share of N taken from the least certain candidates (beta).
        generator: Of the candidates.
        share: Index of the first mask within its step, and the number of masks of the step;
            micro-batches then draw the points of the whole step.

    Returns:
        x and y in [0, 1], shape (R, N, 2).
    """
    count, device = len(mask_logits), mask_logits.device
    first, total = (0, count) if share is None else share

    def uniform_points(number: int) -> Tensor:
        drawn = torch.rand(total, number, 2, generator=generator, device=device)
        return drawn[first : first + count]

    candidates = uniform_points(int(num_points * oversample_ratio))
    num_important = int(num_points * importance_sample_ratio)
    uncertainty = -sample_at(mask_logits.detach().float(), candidates).abs()
    best = uncertainty.topk(num_important, dim=1).indices
    important = torch.take_along_dim(candidates, best[..., None], dim=1)
    return torch.cat((important, uniform_points(num_points - num_important)), dim=1)
