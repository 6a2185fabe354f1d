"""Feature levels of several images in one sequence of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.ops.devices import to_device

SizesHw = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PackedLevels:
    """Layout of the tokens of images of different sizes in one sequence without padding.

    Images are concatenated, each level by level. Layers that act on single tokens need no layout.

    Attributes:
        sizes: Height and width of each level of each image, int32, shape (I, L, 2).
        starts: First token of each level of each image, int64, shape (I, L).
        images: Image index of each query, int32, ascending, shape (N,).
    """

    sizes: Tensor
    starts: Tensor
    images: Tensor

    @classmethod
    def of(cls, sizes_hw: Sequence[SizesHw], device: torch.device) -> "PackedLevels":
        """The layout of images whose tokens are all queries, without waiting for the device.

        ``sizes_hw`` holds height and width of each level, for each image.
        """
        sizes = np.array(sizes_hw, np.int32)
        starts = first_tokens(sizes_hw)
        tokens = sizes.prod(axis=2, dtype=np.int64).sum(axis=1)
        images = np.repeat(np.arange(len(sizes), dtype=np.int32), tokens)
        return cls(*(to_device(torch.from_numpy(a), device) for a in (sizes, starts, images)))

    def for_queries(self, images: Tensor) -> "PackedLevels":
        """The same tokens for other queries; their image indices (N,), ascending."""
        return replace(self, images=images.int())

    def cell_steps(self, offsets: Tensor) -> Tensor:
        """1 / w and 1 / h of each level of each query's image, (N, L, 2), dtype of ``offsets``."""
        return self.sizes.flip(-1).to(offsets.dtype).reciprocal()[self.images.long()]


def first_tokens(sizes_hw: Sequence[SizesHw]) -> NDArray[np.int64]:
    """Index of the first token of each level of each image, shape (I, L)."""
    counts = np.array(sizes_hw, np.int64).prod(axis=2)
    starts: NDArray[np.int64] = np.cumsum(counts).reshape(counts.shape) - counts
    return starts


def tokens_to_maps(tokens: Tensor, sizes_hw: SizesHw) -> list[Tensor]:
    """Tokens (B, S, C), levels concatenated and row-major, as one map (B, C, h, w) per level."""
    parts = torch.split(tokens, [h * w for h, w in sizes_hw], dim=1)
    return [
        part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes_hw, strict=True)
    ]
