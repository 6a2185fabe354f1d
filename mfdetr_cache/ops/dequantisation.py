"""Stored maps as float32 tensors, decoded on the device that needs them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.ops.devices import concatenate_on
from mfdetr_cache.ops.quantisation import StoredMap


def decode_maps(maps: Sequence[StoredMap], device: torch.device | str = "cpu") -> Tensor:
    """Maps of equal size, channels and encoding as float32 (B, C, h, w) in channels-last memory.

    Codes are copied to the device and decoded there.
    """
    return decode_groups([maps], device)[0]


def decode_groups(
    groups: Sequence[Sequence[StoredMap]], device: torch.device | str = "cpu"
) -> list[Tensor]:
    """:func:`decode_maps` for several groups of maps, each of one size, in one transfer.

    The results, (B, C, h, w) per group, are views of one tensor.
    """
    first = groups[0][0]
    channels, encoding = first.channels, first.encoding
    if encoding.is_affine and not encoding.block_tokens and len(groups) > 1:
        # A block is then as large as its image.
        return [decode_maps(maps, device) for maps in groups]
    maps = [m for group in groups for m in group]
    rows = [_rows(m) for m in maps]
    values = concatenate_on([_whole_blocks(m, n) for m, n in zip(maps, rows, strict=True)], device)
    if first.affine is None:
        values = values.float()
    else:
        affine = concatenate_on([m.affine for m in maps if m.affine is not None], device).float()
        if encoding.bits == 4:
            values = torch.stack((values & 15, values >> 4), dim=-1).flatten(1)[:, :channels]
        values = values.unflatten(0, (len(affine), -1)).float()
        values.mul_(affine[:, None, 1]).add_(affine[:, None, 0])
        values = values.flatten(0, 1)
    counts = [sum(_rows(m) for m in group) for group in groups]
    decoded = []
    for part, group in zip(values.split(counts), groups, strict=True):
        height, width = group[0].hw
        cells = part.unflatten(0, (len(group), -1))[:, : height * width]
        decoded.append(cells.unflatten(1, (height, width)).permute(0, 3, 1, 2))
    return decoded


def _rows(stored: StoredMap) -> int:
    """Rows of a map's values that are decoded: its cells, to whole blocks."""
    cells = stored.hw[0] * stored.hw[1]
    if not stored.encoding.block_tokens or stored.affine is None:
        return cells
    return stored.encoding.blocks(cells) * stored.encoding.block_tokens


def _whole_blocks(stored: StoredMap, tokens: int) -> NDArray[np.generic]:
    values = stored.values[:tokens]
    missing = tokens - len(values)
    return np.pad(values, ((0, missing), (0, 0))) if missing else values
