"""Encoder tokens as maps."""

from collections.abc import Sequence

import torch
from torch import Tensor


def tokens_to_maps(tokens: Tensor, sizes_hw: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Flattened multi-scale tokens as one map per level.

    Args:
        tokens: Levels one after the other, row-major, shape (B, S, C).
        sizes_hw: Height and width of each level; their areas sum to S.

    Returns:
        Maps of shape (B, C, h, w).
    """
    parts = torch.split(tokens, [h * w for h, w in sizes_hw], dim=1)
    return [
        part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes_hw, strict=True)
    ]
