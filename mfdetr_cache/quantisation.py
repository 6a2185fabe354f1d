"""How feature maps become small integers and come back: affine, per channel and block of tokens.

A channel's values in a block are stored as ``code`` in 0 .. 2**bits - 1 with two float16 numbers,
``low`` and ``step``: value = low + step * code. Blocks of 64 tokens follow the outliers some
channels have; one scale per token or per tensor would ruin the weak channels. Nothing is clipped:
``low`` is rounded down and ``step`` up until the codes cover the block, so the error of every
value is at most step / 2 (plus the rounding of the product in float32).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.devices import to_device

Preset = Literal["fp16", "int8", "int8-small", "int4"]


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

    def columns(self, channels: int) -> int:
        """Stored values per token.

        Args:
            channels: Channels of the map.

        Returns:
            Width of the stored array.
        """
        return -(-channels // 2) if self.bits == 4 else channels

    def blocks(self, tokens: int) -> int:
        """How many blocks some tokens have.

        Args:
            tokens: Tokens of an image.

        Returns:
            Number of blocks; the last may be shorter.
        """
        return -(-tokens // self.block_tokens) if self.block_tokens else 1


ENCODINGS: dict[Preset, Encoding] = {
    "fp16": Encoding(16, 0),
    "int8": Encoding(8, 64),
    "int8-small": Encoding(8, 0),
    "int4": Encoding(4, 64),
}


@dataclass(frozen=True, slots=True)
class StoredMap:
    """A map of one image as it is stored, or as a live detector gave it.

    ``np.asarray`` and :meth:`to_array` give the values; :func:`decode_maps` does the same for a
    batch on the training device.

    Attributes:
        hw: Height and width in cells.
        channels: Channels.
        encoding: How ``values`` are to be understood.
        values: Cells row-major by stored columns; may have more rows than cells, to whole blocks.
        affine: ``low`` and ``step`` of every block, float16, shape (blocks, 2, C); None for float.
    """

    hw: tuple[int, int]
    channels: int
    encoding: Encoding
    values: NDArray[np.generic]
    affine: NDArray[np.float16] | None = None

    @classmethod
    def plain(cls, values_hwc: NDArray[np.generic]) -> "StoredMap":
        """A map that is not quantised.

        Args:
            values_hwc: Shape (h, w, C), any float type.

        Returns:
            The map.
        """
        height, width, channels = values_hwc.shape
        flat = values_hwc.reshape(height * width, channels)
        return cls((height, width), channels, ENCODINGS["fp16"], flat)

    def to_array(self) -> NDArray[np.generic]:
        """The values.

        Returns:
            Shape (h, w, C): as stored for float, float32 for codes.
        """
        cells = self.hw[0] * self.hw[1]
        if self.affine is None:
            return self.values[:cells].reshape(*self.hw, self.channels)
        decoded = decode_maps([self])[0].permute(1, 2, 0)
        return np.ascontiguousarray(decoded.numpy())

    def __array__(self, dtype: object = None, copy: object = None) -> NDArray[np.generic]:
        return np.asarray(self.to_array(), dtype=dtype)  # type: ignore[call-overload, no-any-return]


def encode_map(
    tokens: NDArray[np.float32], encoding: Encoding
) -> tuple[NDArray[np.generic], NDArray[np.float16] | None]:
    """Values of one image as they are stored.

    Args:
        tokens: Finite values, shape (n, C).
        encoding: How to store them.

    Returns:
        float16 of shape (n, C) and None; or codes, uint8, shape (n, columns), and ``low`` and
        ``step``, float16, shape (blocks, 2, C).
    """
    if not encoding.is_affine:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(tokens, dtype=np.float16), None
    count, channels = tokens.shape
    if not count:
        columns = encoding.columns(channels)
        return np.zeros((0, columns), np.uint8), np.zeros((0, 2, channels), np.float16)
    block = encoding.block_tokens or count
    blocks = encoding.blocks(count)
    values = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.float32))
    if blocks * block > count:
        # Repeating the last token keeps the padding inside the range of its block.
        padding = values[-1:].expand(blocks * block - count, channels)
        values = torch.cat((values, padding))
    values = values.view(blocks, block, channels)
    low, step = _affine(values.amin(dim=1), values.amax(dim=1), 2**encoding.bits - 1)
    scale = torch.where(step > 0, step.float(), 1.0)
    codes = ((values - low.float()[:, None]) / scale[:, None]).round_()
    codes = codes.clamp_(0, 2**encoding.bits - 1).to(torch.uint8)
    packed = codes.view(blocks * block, channels)[:count]
    if encoding.bits == 4:
        packed = torch.nn.functional.pad(packed, (0, channels % 2))
        packed = packed[:, 0::2] | (packed[:, 1::2] << 4)
    return packed.contiguous().numpy(), torch.stack((low, step), dim=1).numpy()


def _affine(lowest: Tensor, highest: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """float16 ``low`` and ``step`` whose codes 0 .. levels cover [lowest, highest]."""
    low = _rounded(lowest, down=True)
    spread = highest - low.float()
    step = _rounded(spread / levels, down=False)
    # A spread so small that the division underflows still needs a step above zero.
    least = torch.full_like(step, torch.finfo(torch.float16).smallest_normal)
    return low, torch.where((spread > 0) & (step == 0), least, step)


def _rounded(values: Tensor, *, down: bool) -> Tensor:
    """Values as float16, never above (``down``) or never below what they were."""
    near = values.to(torch.float16)
    wrong = near.float() > values if down else near.float() < values
    toward = torch.full_like(near, -torch.inf if down else torch.inf)
    return torch.where(wrong, torch.nextafter(near, toward), near)


def decode_maps(maps: list[StoredMap], device: torch.device | str = "cpu") -> Tensor:
    """Maps of equal size as one float tensor: codes travel to the device and are decoded there.

    Args:
        maps: At least one; of the same size, channels and encoding.
        device: Where the result lives.

    Returns:
        float32, shape (B, C, h, w), channels innermost in memory.
    """
    first = maps[0]
    (height, width), channels, encoding = first.hw, first.channels, first.encoding
    if first.affine is None:
        stacked = np.stack([m.values[: height * width] for m in maps])
        values = to_device(torch.from_numpy(stacked), device).float()
    else:
        blocks = encoding.blocks(height * width)
        block = encoding.block_tokens or height * width
        codes = torch.from_numpy(np.stack([_whole_blocks(m, blocks * block) for m in maps]))
        affine = torch.from_numpy(np.stack([m.affine for m in maps if m.affine is not None]))
        codes, affine = to_device(codes, device), to_device(affine, device).float()
        if encoding.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(2)[..., :channels]
        values = codes.view(len(maps), blocks, block, channels).float()
        values.mul_(affine[:, :, None, 1]).add_(affine[:, :, None, 0])
        values = values.view(len(maps), blocks * block, channels)[:, : height * width]
    decoded: Tensor = values.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return decoded


def _whole_blocks(stored: StoredMap, tokens: int) -> NDArray[np.generic]:
    values = stored.values[:tokens]
    missing = tokens - len(values)
    return np.pad(values, ((0, missing), (0, 0))) if missing else values
