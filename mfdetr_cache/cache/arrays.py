"""Every array of a cache: its path, type, shape, and how it is cut into chunks and shards."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from mfdetr_cache.cache.schema import C1_ROI, CacheLayout, c1_channels, stored_maps
from mfdetr_cache.ops.quantisation import ENCODINGS
from mfdetr_cache.types import DetectorSpec, MapSpec


class ColumnSpec(NamedTuple):
    """An array that is written at once, chunked along its first axis.

    Attributes:
        dtype: Zarr data type.
        tail: Shape of one of its rows.
        dimension_names: Names of the axes.
        chunk: Most rows of a chunk.
    """

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
    """Columns that are written when a cache is created, with their lengths.

    Returns:
        Length by path; None where it depends on the names of the images.
    """
    rows = layout.num_rows
    found: dict[str, int | None] = {
        "images/image_id": rows,
        "images/original_hw": rows,
        "images/file_name_utf8": None,
        "images/file_name_offset": rows + 1,
    }
    for view in layout.views:
        for name in ("crop_xyxy", "flip", "shortest_edge"):
            found[f"views/{view}/transform/{name}"] = rows
    return found


def column_name(path: str) -> str:
    """The end of a column's path, which says what it holds."""
    return path.rpartition("/")[2]


def chunk_keys(path: str, spec: ColumnSpec, length: int) -> list[str]:
    """Keys of a column's chunks.

    Returns:
        Keys in order; none for an empty column.
    """
    tail = ["0"] * len(spec.tail)
    return ["/".join([path, "c", str(i), *tail]) for i in range(-(-length // spec.chunk))]


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array that is written part by part.

    Attributes:
        path: Its path inside the store.
        dtype: Zarr data type of its values.
        shape: Full shape.
        chunk: Shape of a chunk, the unit of reading.
        shard: Shape of a shard, the unit of writing; None when a part is a single chunk.
        dimension_names: Names of the axes.
        attributes: Attributes of the array.
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


def row_arrays(spec: DetectorSpec, layout: CacheLayout, view: str) -> dict[str, ArraySpec]:
    """Every array of a view that is written part by part, by its path below the view.

    Returns:
        Array specifications in the order they are written.
    """
    rows, per_part = layout.num_rows, layout.images_per_part
    arrays: dict[str, ArraySpec] = {}

    def add(
        name: str, dtype: str, tail: tuple[int, ...], dims: tuple[str, ...], about: str
    ) -> None:
        # Padded up to whole parts, as Zarr pads its last chunk.
        arrays[name] = ArraySpec(
            f"views/{view}/{name}",
            dtype,
            (rows, *tail),
            (per_part, *tail),
            None,
            ("row", *dims),
            {"description": about},
        )

    add("status", "uint8", (), (), "0 not written, 1 stored, 2 skipped")
    add("resized_hw", "int32", (2,), ("hw",), "image in the network input, without padding; pixels")
    add("input_hw", "int32", (2,), ("hw",), "network input; pixels")
    for name, dtype, width, axis, about in (
        ("class_logits", "float32", spec.num_labels, "label", "before the score function"),
        ("boxes_cxcywh_norm", "float32", 4, "cxcywh", "relative to the resized image"),
        ("queries", "float16", spec.query_dim, "channel", "last decoder output"),
    ):
        shape = (rows, spec.num_queries, width)
        arrays[name] = ArraySpec(
            f"views/{view}/{name}",
            dtype,
            shape,
            (1, *shape[1:]),
            (per_part, *shape[1:]),
            ("row", "query", axis),
            {"description": about},
        )
    for spec_map in stored_maps(spec, layout):
        _add_map(arrays, spec_map, layout, view)
    if layout.c1_roi is not None:
        add(f"{C1_ROI}/c1_hw", "int32", (2,), ("hw",), "height and width of C1, in cells")
        width, most = c1_channels(spec), max(layout.c1_roi.max_crops, 1)
        for name, dtype, tail, dims, about in (
            ("query_index", "int32", (most,), ("crop",), "query of each crop; -1: no crop"),
            ("moments", "float32", (width + 1, width), ("moment", "channel"), _MOMENTS),
        ):
            arrays[f"{C1_ROI}/{name}"] = ArraySpec(
                f"views/{view}/{C1_ROI}/{name}",
                dtype,
                (rows, *tail),
                (1, *tail),
                (per_part, *tail),
                ("row", *dims),
                {"description": about},
            )
    return arrays


def _add_map(
    arrays: dict[str, ArraySpec], spec_map: MapSpec, layout: CacheLayout, view: str
) -> None:
    rows, per_part = layout.num_rows, layout.images_per_part
    place = layout.maps[spec_map.name]
    base = f"maps/{spec_map.name}"
    arrays[f"{base}/hw"] = ArraySpec(
        f"views/{view}/{base}/hw",
        "int32",
        (rows, 2),
        (per_part, 2),
        None,
        ("row", "hw"),
        {"description": "height and width of the map of each row, in cells"},
    )
    arrays[f"{base}/offset"] = ArraySpec(
        f"views/{view}/{base}/offset",
        "int64",
        (rows,),
        (per_part,),
        None,
        ("row",),
        {"description": "first token of each row; its cells follow row-major"},
    )
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
    columns = encoding.columns(spec_map.channels)
    arrays[f"{base}/values"] = ArraySpec(
        f"views/{view}/{base}/values",
        "uint8" if encoding.is_affine else "float16",
        (layout.parts_per_view * place.part_tokens, columns),
        (place.chunk_tokens, columns),
        (place.part_tokens, columns),
        ("token", "channel" if encoding.bits != 4 else "channel_pair"),
        attributes,
    )
    if not encoding.is_affine:
        return
    tail = (2, spec_map.channels)
    if encoding.block_tokens:
        size, axis = encoding.block_tokens, "block"
        whole = layout.parts_per_view * place.part_tokens // size
        chunk, shard = place.chunk_tokens // size, place.part_tokens // size
    else:
        whole, axis, chunk, shard = rows, "row", 1, per_part
    arrays[f"{base}/affine"] = ArraySpec(
        f"views/{view}/{base}/affine",
        "float16",
        (whole, *tail),
        (chunk, *tail),
        (shard, *tail),
        (axis, "low_step", "channel"),
        {"description": "value = low + step * code"},
    )
