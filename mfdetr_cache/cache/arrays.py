"""Every array of a cache: its path, type, shape, and how it is cut into chunks and shards."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mfdetr_cache.cache.schema import C1_ROI, CacheLayout, c1_channels, stored_maps
from mfdetr_cache.ops.quantisation import ENCODINGS
from mfdetr_cache.types import DetectorSpec, MapSpec


class ColumnSpec(NamedTuple):
    """An array that is written at once: rows of shape ``tail``, at most ``chunk`` in a chunk."""

    dtype: str
    tail: tuple[int, ...]
    dimension_names: tuple[str, ...]
    chunk: int = 2**16


# By the end of their path.
COLUMNS = {
    "image_id": ColumnSpec("int64", (), ("row",)),
    "original_hw": ColumnSpec("int32", (2,), ("row", "hw")),
    "file_name_utf8": ColumnSpec("uint8", (), ("byte",)),
    "file_name_offset": ColumnSpec("int64", (), ("row_bound",)),
    "crop_xyxy": ColumnSpec("int32", (4,), ("row", "xyxy")),
    "flip": ColumnSpec("uint8", (), ("row",)),
    "shortest_edge": ColumnSpec("int32", (), ("row",)),
    # Of a version of the annotations.
    "offset": ColumnSpec("int64", (), ("row_bound",)),
    "annotation_id": ColumnSpec("int64", (), ("object",)),
    "category_id": ColumnSpec("int64", (), ("object",)),
    "label": ColumnSpec("int64", (), ("object",)),
    "box_xyxy": ColumnSpec("float32", (4,), ("object", "xyxy")),
    "area": ColumnSpec("float64", (), ("object",)),
    "is_crowd": ColumnSpec("uint8", (), ("object",)),
    "run_length_offset": ColumnSpec("int64", (), ("object_bound",)),
    "run_length": ColumnSpec("uint32", (), ("run",)),
    # Of crops of C1 that a version of the annotations adds; values and affine follow the preset.
    "crop_row": ColumnSpec("int64", (), ("cropped_row",)),
    "crop_offset": ColumnSpec("int64", (), ("cropped_row_bound",)),
    "crop_query": ColumnSpec("int32", (), ("crop",)),
}


def columns_of(spec: DetectorSpec, layout: CacheLayout) -> dict[str, ColumnSpec]:
    """What the columns of a cache hold, by the end of their path."""
    if layout.c1_roi is None:
        return COLUMNS
    encoding, channels = ENCODINGS[layout.preset], c1_channels(spec)
    dtype = "uint8" if encoding.is_affine else "float16"
    width = encoding.columns(channels)
    return {
        **COLUMNS,
        "crop_values": ColumnSpec(dtype, (width,), ("token", "channel"), 2**11),
        "crop_affine": ColumnSpec("float16", (2, channels), ("block", "low_step", "channel"), 2**5),
    }


def image_columns(layout: CacheLayout) -> dict[str, int | None]:
    """Paths and lengths of the columns that are written when a cache is created.

    A length is None where it depends on the names of the images.
    """
    rows = layout.num_rows
    lengths: dict[str, int | None] = {
        "images/image_id": rows,
        "images/original_hw": rows,
        "images/file_name_utf8": None,
        "images/file_name_offset": rows + 1,
    }
    for view in layout.views:
        for name in ("crop_xyxy", "flip", "shortest_edge"):
            lengths[f"views/{view}/transform/{name}"] = rows
    return lengths


def chunk_keys(path: str, spec: ColumnSpec, length: int) -> list[str]:
    """Keys of a column's chunks in order; none for an empty column."""
    tail = ["0"] * len(spec.tail)
    return ["/".join([path, "c", str(i), *tail]) for i in range(-(-length // spec.chunk))]


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array that is written part by part.

    A chunk is the unit of reading, a shard that of writing; None when a part is a single chunk.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    shard: tuple[int, ...] | None
    dimension_names: tuple[str, ...]
    attributes: dict[str, Any]

    @property
    def chunks_per_part(self) -> int:
        """How many chunks one part of this array has room for."""
        return 1 if self.shard is None else self.shard[0] // self.chunk[0]

    def key_of_part(self, part: int) -> str:
        """The store key of the object that holds one part."""
        return "/".join([self.path, "c", str(part), *("0" for _ in self.shape[1:])])


_MOMENTS = "mean of c c^T over the cells of C1, then in the last row the mean of c"
# Along the first axis: the whole array, a chunk, a shard.
_Lengths = tuple[int, int, int | None]


def row_arrays(spec: DetectorSpec, layout: CacheLayout, view: str) -> dict[str, ArraySpec]:
    """Every array of a view by its path below the view, in the order they are written."""
    below_view = _row_arrays(spec, layout)
    return {a.path: replace(a, path=f"views/{view}/{a.path}") for a in below_view}


def _row_arrays(spec: DetectorSpec, layout: CacheLayout) -> Iterator[ArraySpec]:
    # Padded up to whole parts, as Zarr pads its last chunk.
    by_part: _Lengths = (layout.num_rows, layout.images_per_part, None)
    by_row: _Lengths = (layout.num_rows, 1, layout.images_per_part)
    yield _array("status", "uint8", by_part, (), ("row",), "0 not written, 1 stored, 2 skipped")
    for name, about in (
        ("resized_hw", "image in the network input, without padding; pixels"),
        ("input_hw", "network input; pixels"),
    ):
        yield _array(name, "int32", by_part, (2,), ("row", "hw"), about)
    for name, dtype, width, axis, about in (
        ("class_logits", "float32", spec.num_labels, "label", "before the score function"),
        ("boxes_cxcywh_norm", "float32", 4, "cxcywh", "relative to the resized image"),
        ("queries", "float16", spec.query_dim, "channel", "last decoder output"),
    ):
        tail = (spec.num_queries, width)
        yield _array(name, dtype, by_row, tail, ("row", "query", axis), about)
    for spec_map in stored_maps(spec, layout):
        yield from _map_arrays(spec_map, layout)
    if layout.c1_roi is not None:
        width, most = c1_channels(spec), max(layout.c1_roi.max_crops, 1)
        about = "height and width of C1, in cells"
        yield _array(f"{C1_ROI}/c1_hw", "int32", by_part, (2,), ("row", "hw"), about)
        about = "query of each crop; -1: no crop"
        yield _array(f"{C1_ROI}/query_index", "int32", by_row, (most,), ("row", "crop"), about)
        tail, axes = (width + 1, width), ("row", "moment", "channel")
        yield _array(f"{C1_ROI}/moments", "float32", by_row, tail, axes, _MOMENTS)


def _map_arrays(spec_map: MapSpec, layout: CacheLayout) -> Iterator[ArraySpec]:
    base, place = f"maps/{spec_map.name}", layout.maps[spec_map.name]
    by_part: _Lengths = (layout.num_rows, layout.images_per_part, None)
    about = "height and width of the map of each row, in cells"
    yield _array(f"{base}/hw", "int32", by_part, (2,), ("row", "hw"), about)
    about = "first token of each row; its cells follow row-major"
    yield _array(f"{base}/offset", "int64", by_part, (), ("row",), about)
    encoding = ENCODINGS[layout.preset]
    attributes = {
        "role": spec_map.role,
        "stride": spec_map.stride,
        "channels": spec_map.channels,
        "source": spec_map.source,
        "encoding": "affine" if encoding.is_affine else "float",
        "bits": encoding.bits,
        "block_tokens": encoding.block_tokens,
    }
    dtype = "uint8" if encoding.is_affine else "float16"
    tokens = (layout.parts_per_view * place.part_tokens, place.chunk_tokens, place.part_tokens)
    tail = (encoding.columns(spec_map.channels),)
    axes: tuple[str, ...] = ("token", "channel" if encoding.bits != 4 else "channel_pair")
    yield _array(f"{base}/values", dtype, tokens, tail, axes, attributes)
    if not encoding.is_affine:
        return
    lengths, axis = (layout.num_rows, 1, layout.images_per_part), "row"
    if size := encoding.block_tokens:
        lengths, axis = (tokens[0] // size, tokens[1] // size, tokens[2] // size), "block"
    axes, about = (axis, "low_step", "channel"), "value = low + step * code"
    yield _array(f"{base}/affine", "float16", lengths, (2, spec_map.channels), axes, about)


def _array(
    path: str,
    dtype: str,
    lengths: _Lengths,
    tail: tuple[int, ...],
    dimension_names: tuple[str, ...],
    about: str | dict[str, Any],
) -> ArraySpec:
    length, chunk, shard = lengths
    return ArraySpec(
        path,
        dtype,
        (length, *tail),
        (chunk, *tail),
        None if shard is None else (shard, *tail),
        dimension_names,
        {"description": about} if isinstance(about, str) else about,
    )
