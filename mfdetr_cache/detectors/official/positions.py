"""Sine encodings and box arithmetic as the official detectors compute them."""

import math

import torch
from torch import Tensor


def sine_frequencies(width: int, temperature: float, like: Tensor) -> Tensor:
    """The divisors of an axis, T ** (2 * floor(i / 2) / width), shape (width,)."""
    steps = torch.arange(width, dtype=torch.float32, device=like.device)
    exponent = 2 * torch.div(steps, 2, rounding_mode="floor") / width
    return (temperature**exponent).to(like.dtype)


def interleaved_sine(values: Tensor, width: int, temperature: float) -> Tensor:
    """Sine and cosine pairs of values in radians, shape (..., width)."""
    angles = values[..., None] / sine_frequencies(width, temperature, values)
    pairs = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1)
    return pairs.flatten(-2)


def map_position(padding_mask: Tensor, temperature: float, offset: float, like: Tensor) -> Tensor:
    """Position encoding of a map, y half before x half, 128 channels each, shape (B, h * w, 256).

    The mask (B, h, w) is True where a cell is padding. ``temperature`` is 10000 (Deformable DETR,
    H-DETR) or 20 (DINO); ``offset``, 0.5 or 0, is subtracted from the cell count.
    """
    valid = (~padding_mask).to(like.dtype)
    y, x = valid.cumsum(1), valid.cumsum(2)
    y = (y - offset) / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = (x - offset) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    parts = [interleaved_sine(axis, 128, temperature) for axis in (y, x)]
    return torch.cat(parts, dim=-1).flatten(1, 2)


def box_position(boxes_norm: Tensor, order: tuple[int, int, int, int]) -> Tensor:
    """Encoding of normalised cxcywh boxes (B, Q, 4), 128 channels per coordinate, (B, Q, 512).

    ``order`` of the coordinates is (0, 1, 2, 3), or (1, 0, 2, 3) for DINO.
    """
    # Not indexed by a list, which would be copied to a GPU and waited for.
    angles = torch.stack([boxes_norm[..., i] for i in order], dim=-1) * (2 * math.pi)
    return interleaved_sine(angles, 128, 10000).flatten(-2)


def inverse_sigmoid(values: Tensor, eps: float) -> Tensor:
    """Logits of values clipped to [eps, 1 - eps]; 1e-5 (Deformable DETR, H-DETR) or 1e-3 (DINO)."""
    values = values.clamp(0, 1)
    return torch.log(values.clamp(min=eps) / (1 - values).clamp(min=eps))


def valid_ratio(padding_mask: Tensor, like: Tensor) -> Tensor:
    """Fraction of a map (B, h, w) that is not padding along x and y, shape (B, 2)."""
    _, height, width = padding_mask.shape
    rows = (~padding_mask[:, :, 0]).sum(1).to(like.dtype) / height
    columns = (~padding_mask[:, 0, :]).sum(1).to(like.dtype) / width
    return torch.stack((columns, rows), dim=-1)
