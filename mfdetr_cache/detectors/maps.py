"""Encoder tokens as maps."""

from collections.abc import Sequence

import torch
from torch import Tensor


def tokens_to_maps(tokens: Tensor, sizes_hw: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Tokens (B, S, C), levels concatenated and row-major, as one map (B, C, h, w) per level."""
    parts = torch.split(tokens, [h * w for h, w in sizes_hw], dim=1)
    return [
        part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes_hw, strict=True)
    ]
