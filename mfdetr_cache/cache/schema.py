"""How rows, parts and tokens of a cache hang together; fixed when it is created."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from mfdetr_cache.choices import C1Mode, Compression, Preset
from mfdetr_cache.errors import CacheError
from mfdetr_cache.fields import Fields
from mfdetr_cache.ops.quantisation import ENCODINGS
from mfdetr_cache.types import DetectorSpec, MapSpec

FORMAT_NAME = "mfdetr-cache"
FORMAT_VERSION = 2
ATTRIBUTES_KEY = "mfdetr_cache"
BASE_VIEW = "base"

ROW_MISSING, ROW_OK, ROW_SKIPPED = 0, 1, 2

# Sixteen million images: what opening a cache costs grows with them.
MOST_ROWS = 2**24

# A part is what is lost when an extraction is killed. Small enough to sit in memory while it is
# built and to be some minutes of a slow detector, large enough that train2017 becomes tens of
# thousands of files and not millions.
PART_BYTES = 256 * 2**20  # before compression
PART_IMAGES = 64
CHUNK_BYTES = 2**20
# Chunks hold whole blocks of every preset.
TOKEN_MULTIPLE = 64

C1_ROI = "c1_roi"
# COCO has 7.3 objects an image; only the size of parts hangs on this.
_TYPICAL_CROPS = 8


class Part(NamedTuple):
    """The unit that is written whole or not at all: rows of one view, by its number from 0."""

    view: str
    number: int

    def __str__(self) -> str:
        return f"part {self.number} of view {self.view}"


@dataclass(frozen=True, slots=True)
class MapLayout:
    """Where the cells of one map lie on its token axis.

    Every part owns ``part_tokens`` tokens, a multiple of ``chunk_tokens``; inside it the images
    follow one another, each beginning at a chunk boundary. Room that is not needed is never written
    and costs 16 bytes a chunk.
    """

    chunk_tokens: int
    part_tokens: int


@dataclass(frozen=True, slots=True)
class C1RoiLayout:
    """How crops of C1 are stored.

    A crop has ``roi_size`` cells along both axes, each of ``sampling_ratio`` samples along an axis;
    0 adapts to the box. No row has more than ``max_crops``.
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
        views: Their names, ``base`` first.
        maps: Layout of every map by name, the same in every view.
        c1_roi: How crops of C1 are stored, where they are.
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
        """The rows of a part, by its number inside its view."""
        first = part * self.images_per_part
        return range(first, min(first + self.images_per_part, self.num_rows))

    @classmethod
    def from_fields(cls, fields: Fields) -> "CacheLayout":
        """From a cache's attributes; CacheError if a field is not what it can be."""
        roi = None if fields["c1_roi"] is None else fields.fields("c1_roi")
        return cls(
            num_rows=fields.integer("num_rows", 1, MOST_ROWS),
            images_per_part=fields.integer("images_per_part", 1, MOST_ROWS),
            preset=fields.text("preset", tuple(ENCODINGS)),  # type: ignore[arg-type]
            compression=fields.text("compression", ("zstd", "raw")),  # type: ignore[arg-type]
            views=fields.names("views"),
            maps={name: _map_layout(m) for name, m in fields.fields("maps").items()},
            c1=fields.text("c1", ("full", "roi", "none")),  # type: ignore[arg-type]
            c1_roi=None
            if roi is None
            else C1RoiLayout(
                roi_size=roi.integer("roi_size", 8, 1024),
                sampling_ratio=roi.integer("sampling_ratio", 0, 64),
                max_crops=roi.integer("max_crops", 0, 2**20),
            ),
        )


def _map_layout(fields: Fields) -> MapLayout:
    chunk = fields.integer("chunk_tokens", TOKEN_MULTIPLE, 2**28)
    part = fields.integer("part_tokens", chunk, 2**40)
    if chunk % TOKEN_MULTIPLE or part % chunk:
        raise CacheError(f"{fields.where}: {part} tokens are no whole number of chunks of {chunk}")
    return MapLayout(chunk, part)


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
    """Decide chunks and parts; the same arguments always give the same layout.

    ``input_sizes_hw`` are those of all views, ``num_rows`` the images of the split.
    """
    encoding = ENCODINGS[preset]
    chosen = kept_maps(spec, c1)
    # Strided convolutions give floor or ceil of the quotient; a stem with padding may give one
    # more.
    cells = {
        m.name: max(math.prod(-(-side // m.stride) + 1 for side in hw) for hw in input_sizes_hw)
        for m in chosen
    }
    token_bytes = {
        m.name: encoding.columns(m.channels) * (1 if encoding.is_affine else 2) for m in chosen
    }
    image_bytes = sum(cells[m.name] * token_bytes[m.name] for m in chosen)
    image_bytes += spec.num_queries * (spec.query_dim * 2 + 4 * (spec.num_labels + 4))
    if c1_roi is not None:
        crop = c1_roi.roi_size**2 * encoding.columns(c1_channels(spec))
        image_bytes += min(c1_roi.max_crops, _TYPICAL_CROPS) * crop * (encoding.bits + 7) // 8
    images_per_part = max(1, min(PART_IMAGES, PART_BYTES // image_bytes, num_rows))
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
    """Channels of a detector's C1; CacheError if it gives none."""
    for m in spec.maps:
        if m.role == "c1":
            return m.channels
    raise CacheError(f"{spec.name} gives no C1: --c1 roi has nothing to crop; use --c1 none")


def kept_maps(spec: DetectorSpec, c1: C1Mode) -> tuple[MapSpec, ...]:
    """The maps that are stored whole: all, or all but C1."""
    return tuple(m for m in spec.maps if m.role != "c1" or c1 == "full")


def stored_maps(spec: DetectorSpec, layout: CacheLayout) -> tuple[MapSpec, ...]:
    """The maps a cache holds, crops of C1 among them, in the order they are written."""
    maps = kept_maps(spec, layout.c1)
    if layout.c1_roi is None:
        return maps
    source = next(m.source for m in spec.maps if m.role == "c1")
    crops = MapSpec(C1_ROI, "c1_roi", 4, c1_channels(spec), f"crops of {source}")
    return (*maps, crops)
