"""What is in a cache and under which name: the format of ``docs/cache-format.md`` as data."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mfdetr_cache.choices import C1Mode, Compression, Preset
from mfdetr_cache.errors import CacheError
from mfdetr_cache.ops.quantisation import ENCODINGS
from mfdetr_cache.types import DetectorSpec, MapSpec

FORMAT_NAME = "mfdetr-cache"
FORMAT_VERSION = 1
ATTRIBUTES_KEY = "mfdetr_cache"
BASE_VIEW = "base"

ROW_MISSING, ROW_OK, ROW_SKIPPED = 0, 1, 2

# Bytes of one part before compression. Small enough to lose little at a kill and to sit in memory
# while it is built, large enough that train2017 becomes some thousand files and not millions.
PART_BYTES = 256 * 2**20
CHUNK_BYTES = 2**20
# Chunks hold whole blocks of every preset.
TOKEN_MULTIPLE = 64

C1_ROI = "c1_roi"
# COCO has 7.3 objects an image; only the size of parts hangs on this.
_TYPICAL_CROPS = 8


class Part(NamedTuple):
    """The unit that is written whole or not at all: a range of rows of one view.

    Attributes:
        view: Name of the view.
        number: Position among the view's parts, from 0.
    """

    view: str
    number: int

    def __str__(self) -> str:
        return f"part {self.number} of view {self.view}"


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
        """The store key of the object that holds one part.

        Args:
            part: Number of the part.

        Returns:
            A path relative to the cache.
        """
        return "/".join([self.path, "c", str(part), *("0" for _ in self.shape[1:])])


@dataclass(frozen=True, slots=True)
class MapLayout:
    """Where the cells of one map lie on its token axis.

    Every part owns ``part_tokens`` tokens; inside it the images follow one another, each beginning
    at a chunk boundary. Room that is not needed is never written and costs 16 bytes a chunk.

    Attributes:
        chunk_tokens: Tokens per chunk.
        part_tokens: Tokens per part, a multiple of ``chunk_tokens``.
    """

    chunk_tokens: int
    part_tokens: int


@dataclass(frozen=True, slots=True)
class C1RoiLayout:
    """How crops of C1 are stored.

    Attributes:
        roi_size: Cells of a crop along both axes.
        sampling_ratio: Samples per RoIAlign bin along an axis; 0 adapts to the box.
        max_crops: Most crops of any row.
    """

    roi_size: int
    sampling_ratio: int
    max_crops: int


@dataclass(frozen=True)
class CacheLayout:
    """How rows, parts and tokens hang together; fixed when a cache is created.

    Attributes:
        num_rows: Images in the split, skipped ones included.
        images_per_part: Rows of one part.
        preset: How the maps are stored.
        compression: How chunks are compressed.
        views: Names of the views, ``base`` first.
        maps: Layout of every map by name, the same in every view.
        c1: Whether C1 is stored whole, as crops around matched queries, or not at all.
        c1_roi: How the crops are stored, where they are.
    """

    num_rows: int
    images_per_part: int
    preset: Preset
    compression: Compression
    views: tuple[str, ...]
    maps: dict[str, MapLayout]
    c1: C1Mode = "full"
    c1_roi: C1RoiLayout | None = None

    @property
    def parts_per_view(self) -> int:
        """How many parts each view has."""
        return -(-self.num_rows // self.images_per_part)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, view by view."""
        return tuple(Part(v, n) for v in self.views for n in range(self.parts_per_view))

    def rows_of_part(self, part: int) -> range:
        """The rows of one part.

        Args:
            part: Number of the part inside its view.

        Returns:
            Consecutive rows.
        """
        first = part * self.images_per_part
        return range(first, min(first + self.images_per_part, self.num_rows))

    def to_dict(self) -> dict[str, Any]:
        """The layout as it stands in the attributes of a cache."""
        return {
            "num_rows": self.num_rows,
            "images_per_part": self.images_per_part,
            "preset": self.preset,
            "compression": self.compression,
            "views": list(self.views),
            "c1": self.c1,
            "c1_roi": None if self.c1_roi is None else asdict(self.c1_roi),
            "maps": {
                name: {"chunk_tokens": m.chunk_tokens, "part_tokens": m.part_tokens}
                for name, m in self.maps.items()
            },
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CacheLayout":
        """The layout from a cache's attributes.

        Args:
            values: What :meth:`to_dict` gave.

        Returns:
            The layout.

        Raises:
            CacheError: If the preset or the compression is unknown to this version.
        """
        if values["preset"] not in ENCODINGS:
            raise CacheError(f"the cache stores its maps as {values['preset']!r}, unknown here")
        if values["compression"] not in ("zstd", "raw"):
            raise CacheError(f"the cache is compressed by {values['compression']!r}, unknown here")
        return cls(
            values["num_rows"],
            values["images_per_part"],
            values["preset"],
            values["compression"],
            tuple(values["views"]),
            {name: MapLayout(**m) for name, m in values["maps"].items()},
            values["c1"],
            None if values["c1_roi"] is None else C1RoiLayout(**values["c1_roi"]),
        )


def map_size_bound(spec: MapSpec, input_hw: tuple[int, int]) -> int:
    """The most cells a map can have for an input of the given size.

    Args:
        spec: The map.
        input_hw: Height and width of the network input.

    Returns:
        Number of cells. Strided convolutions give floor or ceil of the quotient; a stem with
        padding may give one more.
    """
    height, width = (-(-side // spec.stride) + 1 for side in input_hw)
    return height * width


def plan_layout(
    spec: DetectorSpec,
    input_sizes_hw: set[tuple[int, int]],
    num_rows: int,
    preset: Preset,
    compression: Compression = "zstd",
    views: tuple[str, ...] = (BASE_VIEW,),
    c1: C1Mode = "full",
    c1_roi: C1RoiLayout | None = None,
) -> CacheLayout:
    """Decide chunks and parts for a detector and the input sizes of a dataset.

    Args:
        spec: The detector.
        input_sizes_hw: Every network input size that occurs, over all views.
        num_rows: Images in the split.
        preset: How the maps are stored.
        compression: How chunks are compressed.
        views: Names of the views.
        c1: How much of C1 is stored.
        c1_roi: How crops of C1 are stored, for ``roi``.

    Returns:
        The layout; the same arguments always give the same one.
    """
    encoding = ENCODINGS[preset]
    chosen = _kept_maps(spec, c1)
    cells = {m.name: max(map_size_bound(m, hw) for hw in input_sizes_hw) for m in chosen}
    token_bytes = {
        m.name: encoding.columns(m.channels) * (1 if encoding.is_affine else 2) for m in chosen
    }
    image_bytes = sum(cells[m.name] * token_bytes[m.name] for m in chosen)
    image_bytes += spec.num_queries * (spec.query_dim * 2 + 4 * (spec.num_labels + 4))
    if c1_roi is not None:
        crop = c1_roi.roi_size**2 * encoding.columns(c1_channels(spec))
        image_bytes += min(c1_roi.max_crops, _TYPICAL_CROPS) * crop * (encoding.bits + 7) // 8
    images_per_part = max(1, min(256, PART_BYTES // image_bytes, num_rows))
    maps = {}
    for m in chosen:
        # Chunks near CHUNK_BYTES that divide the largest image evenly, so that little is padding.
        chunks = max(1, -(-cells[m.name] * token_bytes[m.name] // CHUNK_BYTES))
        chunk_tokens = -(-cells[m.name] // (chunks * TOKEN_MULTIPLE)) * TOKEN_MULTIPLE
        maps[m.name] = MapLayout(chunk_tokens, chunks * chunk_tokens * images_per_part)
    if c1_roi is not None:
        crop_tokens = c1_roi.roi_size**2
        room = max(c1_roi.max_crops, 1) * crop_tokens * images_per_part
        maps[C1_ROI] = MapLayout(crop_tokens, room)
    return CacheLayout(num_rows, images_per_part, preset, compression, views, maps, c1, c1_roi)


def c1_channels(spec: DetectorSpec) -> int:
    """Channels of a detector's C1.

    Args:
        spec: The detector.

    Returns:
        Channels.

    Raises:
        CacheError: If it gives no C1.
    """
    for m in spec.maps:
        if m.role == "c1":
            return m.channels
    raise CacheError(f"{spec.name} gives no C1: --c1 roi has nothing to crop; use --c1 none")


def _kept_maps(spec: DetectorSpec, c1: C1Mode) -> tuple[MapSpec, ...]:
    return tuple(m for m in spec.maps if m.role != "c1" or c1 == "full")


def stored_maps(spec: DetectorSpec, layout: CacheLayout) -> tuple[MapSpec, ...]:
    """The maps a cache holds, crops of C1 among them.

    Args:
        spec: The detector.
        layout: The layout.

    Returns:
        Specifications in the order they are written.
    """
    maps = _kept_maps(spec, layout.c1)
    if layout.c1_roi is None:
        return maps
    source = next(m.source for m in spec.maps if m.role == "c1")
    crops = MapSpec(C1_ROI, "c1_roi", 4, c1_channels(spec), f"crops of {source}")
    return (*maps, crops)


_MOMENTS = "mean of c c^T over the cells of C1, then in the last row the mean of c"


def row_arrays(spec: DetectorSpec, layout: CacheLayout, view: str) -> dict[str, ArraySpec]:
    """Every array of a view that is written part by part, by its path below the view.

    Args:
        spec: The detector.
        layout: The layout.
        view: Name of the view.

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
