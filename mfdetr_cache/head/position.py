"""Sine position encoding of map cells, as the encoders of Deformable DETR and H-DETR add it."""

import math

import torch
from torch import Tensor


def sine_position(
    size_hw: tuple[int, int], width: int, device: torch.device, temperature: float = 10000.0
) -> Tensor:
    """Position encoding of an unpadded map.

    Args:
        size_hw: Height and width of the map in cells.
        width: Channels, even; the first half encodes y, the second x.
        device: Where the result lives.
        temperature: Base of the frequencies.

    Returns:
        One row per cell, row-major, shape (h * w, width).
    """
    half = width // 2
    exponent = torch.div(torch.arange(half, device=device), 2, rounding_mode="floor") * 2 / half
    frequency = temperature**-exponent

    def encode(count: int) -> Tensor:
        # (i + 0.5) / count: the half-cell offset of the official code, over a map without padding.
        angle = (torch.arange(count, device=device) + 0.5) / (count + 1e-6) * 2 * math.pi
        phase = angle[:, None] * frequency
        return torch.where(torch.arange(half, device=device) % 2 == 0, phase.sin(), phase.cos())

    rows, cols = encode(size_hw[0]), encode(size_hw[1])
    grid = torch.cat(
        (
            rows[:, None].expand(-1, size_hw[1], -1),
            cols[None].expand(size_hw[0], -1, -1),
        ),
        dim=-1,
    )
    return grid.flatten(0, 1)
