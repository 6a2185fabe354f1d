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
    """Where the tokens of images of different sizes lie in one sequence, and whose a query is.

    One image stands behind the other, each level by level. Nothing is padded, and the layers around
    the attention, which look at one token at a time, need not know where an image begins.

    Attributes:
        sizes: Height and width of each level of each image, int32, shape (I, L, 2).
        starts: First token of each level of each image, int64, shape (I, L).
        images: The image of each query, int32, rising, shape (N,).
    """

    sizes: Tensor
    starts: Tensor
    images: Tensor

    @classmethod
    def of(cls, sizes_hw: Sequence[SizesHw], device: torch.device) -> "PackedLevels":
        """The layout of some images whose tokens are all queries.

        Args:
            sizes_hw: Height and width of each level, for each image.
            device: Where the tokens are.

        Returns:
            The layout; nothing waits for the device.
        """
        sizes = np.array(sizes_hw, np.int32)
        starts = first_tokens(sizes_hw)
        tokens = sizes.prod(axis=2, dtype=np.int64).sum(axis=1)
        images = np.repeat(np.arange(len(sizes), dtype=np.int32), tokens)
        return cls(*(to_device(torch.from_numpy(a), device) for a in (sizes, starts, images)))

    def for_queries(self, images: Tensor) -> "PackedLevels":
        """The same tokens, looked at by other queries.

        Args:
            images: The image of each query, rising, shape (N,).

        Returns:
            The layout for them.
        """
        return replace(self, images=images.int())

    def cell_steps(self, offsets: Tensor) -> Tensor:
        """Width and height of a cell of each level of each query's image, normalised.

        Args:
            offsets: What it will be multiplied with; gives the type.

        Returns:
            1 / w and 1 / h, shape (N, L, 2).
        """
        return self.sizes.flip(-1).to(offsets.dtype).reciprocal()[self.images.long()]


def first_tokens(sizes_hw: Sequence[SizesHw]) -> NDArray[np.int64]:
    """Where each level of each image begins.

    Args:
        sizes_hw: Height and width of each level, for each image.

    Returns:
        Its first token, shape (I, L).
    """
    counts = np.array(sizes_hw, np.int64).prod(axis=2)
    starts: NDArray[np.int64] = np.cumsum(counts).reshape(counts.shape) - counts
    return starts
