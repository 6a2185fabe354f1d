"""Sine position encoding of map cells, as the detectors' encoders add it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mfdetr_cache.ops.devices import kept


@dataclass(frozen=True, slots=True)
class SineEncoding:
    """Position encoding of a detector's encoder.

    Attributes:
        temperature: Base of the frequencies.
        shift: Offset of the reference point from a cell's centre along both axes, in cells.
    """

    temperature: float = 10000.0
    shift: float = 0.0


DINO_SINE = SineEncoding(temperature=20.0, shift=0.5)


def sine_position(centres: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """Position encoding of the cells of unpadded maps, shape (S, width), y before x.

    The centres (S, 2) are x and y in (0, 1). The official code divides by the size and 1e-6, a
    difference in the last bit of float32.
    """
    half = width // 2
    frequency, phase = _frequencies(half, temperature, centres.device, centres.dtype)
    return torch.addcmul(phase, centres.flip(-1)[..., None], frequency).sin().flatten(-2)


@kept(64)
def _frequencies(
    half: int, temperature: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Frequency and phase of each channel; a phase of pi / 2 makes a cosine of a sine."""
    channel = torch.arange(half, device=device)
    exponent = torch.div(channel, 2, rounding_mode="floor").double() * 2 / half
    frequency = 2 * math.pi * temperature**-exponent
    return frequency.to(dtype), (channel % 2 * (math.pi / 2)).to(dtype)
