"""Quantisation of feature maps: affine, per channel and block of tokens.

A channel's values in a block are stored as ``code`` in 0 .. 2**bits - 1 with two float16 numbers,
``low`` and ``step``: value = low + step * code. Blocks of 64 tokens follow the outliers some
channels have; one scale per token or per tensor would ruin the weak channels. Nothing is clipped:
``low`` is rounded down and ``step`` up until the codes cover the block, so the error of every value
is at most step / 2 (plus the rounding of the product in float32).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.choices import Preset
from mfdetr_cache.errors import CacheError

_NOT_FINITE = "a map is not finite as float16; the detector or its input is broken"


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the values of a map are stored.

    Attributes:
        bits: Bits of a code: 8, or 4 (two channels in a byte, the even one in the low half); 16
            stores float16 as it is.
        block_tokens: Tokens that share ``low`` and ``step``; 0 for all tokens of an image.
    """

    bits: Literal[16, 8, 4]
    block_tokens: int

    @property
    def is_affine(self) -> bool:
        """Whether there are codes with ``low`` and ``step``, not plain float16."""
        return self.bits < 16

    @property
    def largest(self) -> float:
        """Largest absolute value in float32: float16's own, or of plain ones what rounds to it."""
        return 65504.0 if self.is_affine else 65520 - 2**-8

    def columns(self, channels: int) -> int:
        """Stored values per token."""
        return -(-channels // 2) if self.bits == 4 else channels

    def blocks(self, tokens: int) -> int:
        """Number of blocks, the last of which may be shorter."""
        return -(-tokens // self.block_tokens) if self.block_tokens else 1


ENCODINGS: dict[Preset, Encoding] = {
    "fp16": Encoding(16, 0),
    "int8": Encoding(8, 64),
    "int8-small": Encoding(8, 0),
    "int4": Encoding(4, 64),
}


@dataclass(frozen=True, slots=True)
class StoredMap:
    """A map of one image as stored, or as a live detector returned it.

    ``np.asarray`` and :meth:`to_array` give the values; :mod:`mfdetr_cache.ops.dequantisation` does
    the same for a batch on the training device.

    Attributes:
        hw: Height and width in cells.
        channels: Number of channels.
        encoding: Encoding of ``values``.
        values: Cells row-major by stored columns; may be padded with rows to whole blocks.
        affine: ``low`` and ``step`` of every block, float16, shape (blocks, 2, C); None for float.
    """

    hw: tuple[int, int]
    channels: int
    encoding: Encoding
    values: NDArray[np.generic]
    affine: NDArray[np.float16] | None = None

    @classmethod
    def plain(cls, values_hwc: NDArray[np.generic]) -> "StoredMap":
        """A map that is not quantised, from values of any float dtype, shape (h, w, C)."""
        height, width, channels = values_hwc.shape
        flat = values_hwc.reshape(height * width, channels)
        return cls((height, width), channels, ENCODINGS["fp16"], flat)

    def to_array(self) -> NDArray[np.generic]:
        """The values, shape (h, w, C): float as stored, codes as float32."""
        cells = self.hw[0] * self.hw[1]
        if self.affine is None:
            return self.values[:cells].reshape(*self.hw, self.channels)
        # torch takes seconds to import, and what describes a cache decodes nothing.
        from mfdetr_cache.ops.dequantisation import decode_maps

        decoded = decode_maps([self])[0].permute(1, 2, 0)
        return np.ascontiguousarray(decoded.numpy())

    def __array__(self, dtype: object = None, copy: object = None) -> NDArray[np.generic]:
        return np.asarray(self.to_array(), dtype=dtype)  # type: ignore[call-overload, no-any-return]


def encode_map(
    tokens: NDArray[np.float32], encoding: Encoding
) -> tuple[NDArray[np.generic], NDArray[np.float16] | None]:
    """Encode values of shape (n, C).

    Returns either float16 values (n, C) and None, or codes, uint8, shape (n, columns), with ``low``
    and ``step``, float16, shape (blocks, 2, C). CacheError if a value is not finite or outside of
    float16's range.
    """
    if not encoding.is_affine:
        with np.errstate(over="ignore"):
            halves = np.ascontiguousarray(tokens, dtype=np.float16)
        if not np.isfinite(halves).all():
            raise CacheError(_NOT_FINITE)
        return halves, None
    count, channels = tokens.shape
    if not count:
        columns = encoding.columns(channels)
        return np.zeros((0, columns), np.uint8), np.zeros((0, 2, channels), np.float16)
    # numba takes half a second to import, and only what writes a cache needs it.
    from mfdetr_cache.ops.quantisation_numba import block_codes, block_extremes

    block = encoding.block_tokens or count
    planes = np.ascontiguousarray(tokens.T, dtype=np.float32)
    lowest, highest = np.empty((2, encoding.blocks(count), channels), np.float32)
    if not block_extremes(planes, planes.view(np.int32), block, lowest, highest):
        raise CacheError(_NOT_FINITE)
    most = 2**encoding.bits - 1
    low, step = _affine(lowest, highest, most)
    scale = np.where(step > 0, step, np.float16(1)).astype(np.float32)
    codes: NDArray[np.uint8] = np.empty((count, channels), np.uint8)
    block_codes(planes, block, low.astype(np.float32), scale, np.float32(most), codes)
    if encoding.bits == 4:
        codes = np.pad(codes, ((0, 0), (0, channels % 2)))
        codes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return codes, np.stack((low, step), axis=1)


def _affine(
    lowest: NDArray[np.float32], highest: NDArray[np.float32], levels: int
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """float16 ``low`` and ``step`` whose codes 0 .. levels cover [lowest, highest]."""
    # Which zero is the least of 0 and -0 is up to the machine; the bytes of a cache are not.
    low = _rounded(lowest + np.float32(0), down=True)
    spread = highest + np.float32(0) - low.astype(np.float32)
    step = _rounded(spread / np.float32(levels), down=False)
    # A spread so small that the division underflows still needs a step above zero.
    step[(spread > 0) & (step == 0)] = np.finfo(np.float16).smallest_normal
    return low, step


def _rounded(values: NDArray[np.float32], *, down: bool) -> NDArray[np.float16]:
    """Values as float16, never above (``down``) or never below what they were."""
    near = values.astype(np.float16)
    back = near.astype(np.float32)
    wrong = back > values if down else back < values
    near[wrong] = np.nextafter(near[wrong], np.float16(-np.inf if down else np.inf))
    return near
