"""Quantising the maps of a batch on the device they are on, with the bytes that a CPU gives.

What is copied to the host is then a quarter of the float32 values. Every operation rounds as IEEE
754 says, in the same order as in :mod:`mfdetr_cache.ops.quantisation`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from mfdetr_cache.ops.quantisation import Encoding, StoredMap

_SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
# Bits of the float16 below zero that is nearest to it; of the one above it are 1.
_BELOW_ZERO = -(2**15) + 1


@dataclass(frozen=True, slots=True)
class EncodedMaps:
    """A map of B images as it is stored, on any device.

    Attributes:
        values: float16 (B, n, C), or codes, uint8, shape (B, n, columns); n cells, row-major.
        affine: ``low`` and ``step``, float16, shape (B, blocks, 2, C); None for float.
        largest: Largest absolute value of each image, NaN if one is, float32, shape (B,).
    """

    hw: tuple[int, int]
    channels: int
    encoding: Encoding
    values: Tensor
    affine: Tensor | None
    largest: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are, in order."""
        return [t for t in (self.values, self.affine, self.largest) if t is not None]

    def with_tensors(self, tensors: Iterator[Tensor]) -> "EncodedMaps":
        """The same with the next of other tensors, copies of :attr:`tensors`."""
        values = next(tensors)
        affine = None if self.affine is None else next(tensors)
        return replace(self, values=values, affine=affine, largest=next(tensors))

    def of_image(self, index: int) -> "EncodedMaps":
        """The map of one image, as a batch of one; nothing is copied."""
        one = slice(index, index + 1)
        affine = None if self.affine is None else self.affine[one]
        return replace(self, values=self.values[one], affine=affine, largest=self.largest[one])

    def stored(self) -> StoredMap:
        """The map of a batch of one that is on the host."""
        affine = None if self.affine is None else self.affine[0].numpy()
        values = self.values[0].numpy()
        return StoredMap(self.hw, self.channels, self.encoding, values, affine)


def encode_maps(maps: Tensor, encoding: Encoding) -> EncodedMaps:
    """Encode maps (B, C, h, w); values that are not finite show in ``largest`` alone."""
    channels, height, width = maps.shape[1:]
    planes = maps.float().flatten(2)
    count = planes.shape[2]
    largest = planes.abs().amax((1, 2))
    if not encoding.is_affine:
        values, affine = planes.half().transpose(1, 2).contiguous(), None
    else:
        block = encoding.block_tokens or count
        # A repeated value changes no extreme.
        blocks = functional.pad(planes, (0, -count % block), "replicate").unflatten(2, (-1, block))
        low, step = _affine(blocks.amin(3), blocks.amax(3), 2**encoding.bits - 1)
        scale = torch.where(step > 0, step, torch.ones_like(step)).float()
        codes = (blocks - low.float()[..., None]) / scale[..., None]
        codes = codes.clamp_(0, 2**encoding.bits - 1).round_().to(torch.uint8).flatten(2)
        values = codes[..., :count].transpose(1, 2).contiguous()
        if encoding.bits == 4:
            values = functional.pad(values, (0, channels % 2))
            values = values[..., 0::2] | (values[..., 1::2] << 4)
        affine = torch.stack((low, step), dim=3).permute(0, 2, 3, 1).contiguous()
    return EncodedMaps((height, width), channels, encoding, values, affine, largest)


def _affine(lowest: Tensor, highest: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """float16 ``low`` and ``step`` whose codes 0 .. levels cover [lowest, highest]."""
    low = _rounded(lowest + 0.0, down=True)
    spread = highest + 0.0 - low.float()
    # A GPU multiplies by the reciprocal of a plain number.
    step = _rounded(spread / torch.full_like(spread, levels), down=False)
    tiny = (spread > 0) & (step == 0)
    return low, step.masked_fill(tiny, _SMALLEST_NORMAL)


def _rounded(values: Tensor, *, down: bool) -> Tensor:
    """Values as float16, never above (``down``) or never below what they were."""
    near = values.half()
    back = near.float()
    wrong = back > values if down else back < values
    bits = near.view(torch.int16)
    # Bits rise with the size of a number, and the sign is the highest.
    grows = near < 0 if down else near > 0
    nearest = torch.full_like(bits, _BELOW_ZERO if down else 1)
    next_bits = torch.where(near == 0, nearest, torch.where(grows, bits + 1, bits - 1))
    return torch.where(wrong, next_bits, bits).view(torch.float16)
