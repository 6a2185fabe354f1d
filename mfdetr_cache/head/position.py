"""Sine position encoding of map cells, as the encoders of Deformable DETR and H-DETR add it."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from mfdetr_cache.devices import is_plain


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
    rows, cols = (_encoded_side(side, half, device, temperature) for side in size_hw)
    grid = torch.cat(
        (
            rows[:, None].expand(-1, size_hw[1], -1),
            cols[None].expand(size_hw[0], -1, -1),
        ),
        dim=-1,
    )
    return grid.flatten(0, 1)


def _encoded_side(count: int, half: int, device: torch.device, temperature: float) -> Tensor:
    """The encoding of one coordinate of so many cells, shape (count, half)."""
    if is_plain(torch.empty(0, device=device)):
        return _kept_side(count, half, device, temperature)
    return _encode_side(count, half, device, temperature)


def _encode_side(count: int, half: int, device: torch.device, temperature: float) -> Tensor:
    exponent = torch.div(torch.arange(half, device=device), 2, rounding_mode="floor") * 2 / half
    frequency = temperature**-exponent
    # (i + 0.5) / count: the half-cell offset of the official code, over a map without padding.
    angle = (torch.arange(count, device=device) + 0.5) / (count + 1e-6) * 2 * math.pi
    phase = angle[:, None] * frequency
    return torch.where(torch.arange(half, device=device) % 2 == 0, phase.sin(), phase.cos())


# A dozen small operations for each side of each level, the same ones again and again.
@lru_cache(maxsize=1024)
def _kept_side(count: int, half: int, device: torch.device, temperature: float) -> Tensor:
    with torch.inference_mode(mode=False):  # a training may be the next to use it
        return _encode_side(count, half, device, temperature)
