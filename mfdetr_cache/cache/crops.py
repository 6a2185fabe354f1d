"""Crops of C1 that a version of the annotations adds to a cache which holds C1 as crops.

New annotations match other queries than the first ones did. For every row where a crop is missing,
the version holds all crops that the row needs, as a new extraction would have written them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.cache.columns import Columns
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import c1_channels
from mfdetr_cache.errors import MEND, CacheError
from mfdetr_cache.ops.quantisation import ENCODINGS, StoredMap, encode_map
from mfdetr_cache.types import C1Crops


def crop_columns(root: Root, crops: Mapping[int, C1Crops]) -> dict[str, NDArray[np.generic]]:
    """Columns of rows, crops, tokens and blocks, by name, from the crops of rising rows."""
    encoding = ENCODINGS[root.layout.preset]
    values, affine = [], []
    for image_crops in crops.values():
        side = image_crops.crops.hw[1]
        tokens = np.asarray(image_crops.crops.to_array(), np.float32).reshape(
            -1, image_crops.crops.channels
        )
        stored, scales = encode_map(tokens, encoding)
        assert len(stored) == len(image_crops.query_index) * side**2
        values.append(stored)
        affine += [] if scales is None else [scales]
    counts = [len(image_crops.query_index) for image_crops in crops.values()]
    columns: dict[str, NDArray[np.generic]] = {
        "crop_row": np.array(list(crops), np.int64),
        "crop_offset": np.cumsum([0, *counts], dtype=np.int64),
        "crop_query": _joined([f.query_index for f in crops.values()], ()).astype(np.int32),
        "crop_values": _joined(values, root.column("crop_values").tail),
    }
    if encoding.is_affine:
        columns["crop_affine"] = _joined(affine, root.column("crop_affine").tail)
    return columns


def _joined(parts: Sequence[NDArray[np.generic]], tail: tuple[int, ...]) -> NDArray[np.generic]:
    return np.concatenate(parts) if parts else np.zeros((0, *tail), np.uint8)


def crop_lengths(root: Root, base: str, rows: int, crops: int) -> dict[str, int]:
    """How long the columns are."""
    layout = root.layout
    assert layout.c1_roi is not None
    tokens, encoding = crops * layout.c1_roi.roi_size**2, ENCODINGS[layout.preset]
    lengths = {"crop_row": rows, "crop_offset": rows + 1, "crop_query": crops}
    lengths["crop_values"] = tokens
    if encoding.is_affine:
        lengths["crop_affine"] = encoding.blocks(tokens) if encoding.block_tokens else rows
    return {f"{base}/{name}": length for name, length in lengths.items()}


def read_crops(
    columns: Columns, root: Root, base: str, row: int
) -> tuple[NDArray[np.int64], StoredMap] | None:
    """Query of each crop of a row, rising, and the crops; None if the version has none for it.

    CacheError if a column is damaged.
    """
    rows = columns[f"{base}/crop_row"]
    index = int(np.searchsorted(rows, row))
    if index == len(rows) or rows[index] != row:
        return None
    layout, encoding = root.layout, ENCODINGS[root.layout.preset]
    assert layout.c1_roi is not None
    side = layout.c1_roi.roi_size
    first, last = columns.bounds(f"{base}/crop_offset", f"{base}/crop_query", index)
    queries = columns[f"{base}/crop_query"][first:last].astype(np.int64)
    if ((queries < 0) | (queries >= root.spec.num_queries)).any() or (np.diff(queries) <= 0).any():
        raise CacheError(f"{base}: row {row} has crops of unknown queries; {MEND}")
    values = columns.slice(f"{base}/crop_values", first * side**2, last * side**2)
    affine = None
    if encoding.is_affine:
        first_block, last_block = index, index + 1
        if size := encoding.block_tokens:
            first_block, last_block = first * side**2 // size, last * side**2 // size
        affine = columns.slice(f"{base}/crop_affine", first_block, last_block)
    hw = ((last - first) * side, side)
    return queries, StoredMap(hw, c1_channels(root.spec), encoding, values, affine)
