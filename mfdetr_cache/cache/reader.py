"""Reads a cache: by row, from any number of threads, refusing what is damaged or unfinished."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from mfdetr_cache.cache.manifest import part_is_whole, read_manifest
from mfdetr_cache.cache.schema import (
    ATTRIBUTES_KEY,
    BASE_VIEW,
    FORMAT_NAME,
    FORMAT_VERSION,
    ROW_OK,
    ArraySpec,
    CacheLayout,
    row_arrays,
)
from mfdetr_cache.cache.shards import ShardReader, decode_chunk
from mfdetr_cache.errors import CacheError
from mfdetr_cache.identity import Identity, spec_from_identity
from mfdetr_cache.types import CachedImage, DetectorSpec, GroundTruth, ImageGeometry


@dataclass(frozen=True, slots=True)
class ArraySummary:
    """One large array of a cache, for people.

    Attributes:
        name: Its path below the view.
        shape: What one image has of it.
        dtype: Stored type.
        source: Where in the detector it comes from.
    """

    name: str
    shape: str
    dtype: str
    source: str


class FeatureCache:
    """A cache, open for reading. Iterating and indexing go over the stored images.

    Args:
        path: The cache.
        attributes: Its root attributes, checked.

    Attributes:
        path: The cache.
        cache_id: Hash of its identity.
        format_version: Version of the format it is written in.
        identity: What decides its content.
        spec: The detector it was made with.
        layout: Rows, parts and tokens.
        categories: ``{"id", "name"}`` of the dataset's categories.
        label_categories: Category id of each detector label, -1 for none.
    """

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self.path = path
        self.cache_id: str = attributes["cache_id"]
        self.format_version: int = attributes["format_version"]
        self.identity: Identity = attributes["identity"]
        self.spec: DetectorSpec = spec_from_identity(self.identity["detector"])
        self.layout = CacheLayout.from_dict(attributes["layout"])
        self.categories: list[dict[str, Any]] = attributes["categories"]
        self.label_categories = tuple(int(c) for c in attributes["label_categories"])
        self._arrays = row_arrays(self.spec, self.layout, BASE_VIEW)
        self._group = zarr.open_group(str(path), mode="r")
        self._upfront: dict[str, NDArray[Any]] = {}

    @classmethod
    def open(cls, path: Path | str) -> "FeatureCache":
        """Open a cache for reading.

        Args:
            path: The cache.

        Returns:
            The cache; parts may be missing, see :meth:`require_complete`.

        Raises:
            CacheError: If there is none, or its format is newer than this version reads.
        """
        path = Path(path)
        if not path.exists():
            raise CacheError(f"cache {path} does not exist; make it with: mfdetr extract")
        try:
            document = json.loads((path / "zarr.json").read_bytes())
            attributes = document["attributes"][ATTRIBUTES_KEY]
            name, version = attributes["format"], attributes["format_version"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CacheError(
                f"{path} is no feature cache (no {ATTRIBUTES_KEY} attributes)"
            ) from None
        if name != FORMAT_NAME or not isinstance(version, int) or version > FORMAT_VERSION:
            raise CacheError(
                f"{path} has cache format {version}, this version reads up to {FORMAT_VERSION}; "
                "update mfdetr-cache"
            )
        return cls(path, attributes)

    @functools.cached_property
    def missing_parts(self) -> tuple[int, ...]:
        """Parts that were never sealed or have lost a file."""
        parts = range(self.layout.num_parts)
        return tuple(p for p in parts if not part_is_whole(self.path, p))

    @property
    def is_complete(self) -> bool:
        """Whether every part is there."""
        return not self.missing_parts

    def require_complete(self) -> None:
        """Refuse to go on with a cache that is not whole.

        Raises:
            CacheError: Saying how many parts are missing.
        """
        if self.missing_parts:
            raise CacheError(
                f"{self.path} is not finished: {len(self.missing_parts)} of "
                f"{self.layout.num_parts} parts are missing; run the same extract again"
            )

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """Rows with content, in order; skipped images are not among them."""
        return tuple(int(r) for r in np.flatnonzero(self._table("status") == ROW_OK))

    @functools.cached_property
    def skipped(self) -> tuple[dict[str, Any], ...]:
        """Row, image id and reason of every image that was left out."""
        manifests = (read_manifest(self.path, p) for p in range(self.layout.num_parts))
        return tuple(s for m in manifests if m is not None for s in m["skipped"])

    @functools.cached_property
    def stored_bytes(self) -> int:
        """Bytes of all sealed parts."""
        manifests = (read_manifest(self.path, p) for p in range(self.layout.num_parts))
        return sum(f["bytes"] for m in manifests if m is not None for f in m["files"].values())

    def stored_bytes_of_arrays(self) -> dict[str, int]:
        """Bytes of all sealed parts of every array, by its name below the view."""
        totals = dict.fromkeys(self._arrays, 0)
        for part in range(self.layout.num_parts):
            manifest = read_manifest(self.path, part)
            if manifest is not None:
                for name, spec in self._arrays.items():
                    totals[name] += manifest["files"][spec.key_of_part(part)]["bytes"]
        return totals

    def array_summaries(self) -> tuple[ArraySummary, ...]:
        """The large arrays: detections, queries and maps."""
        spec = self.spec
        found = [
            ArraySummary(name, f"{spec.num_queries} x {width}", self._arrays[name].dtype, "decoder")
            for name, width in (
                ("class_logits", spec.num_labels),
                ("boxes_cxcywh_norm", 4),
                ("queries", spec.query_dim),
            )
        ]
        for m in spec.maps:
            name = f"maps/{m.name}/values"
            shape = f"{m.channels} at 1/{m.stride}"
            found.append(ArraySummary(name, shape, self._arrays[name].dtype, m.source))
        return tuple(found)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CachedImage:
        return self.read(self.rows[index])

    def __iter__(self) -> Iterator[CachedImage]:
        return (self.read(row) for row in self.rows)

    def image_id(self, row: int) -> int:
        """COCO image id of a row.

        Args:
            row: Row in the cache.

        Returns:
            The id.
        """
        return int(self._known("images/image_id")[row])

    def file_name(self, row: int) -> str:
        """Name of a row's image, relative to the image folder.

        Args:
            row: Row in the cache.

        Returns:
            The name.
        """
        first, last = self._known("images/file_name_offset")[row : row + 2]
        return bytes(self._known("images/file_name_utf8")[first:last]).decode()

    def geometry(self, row: int) -> ImageGeometry:
        """Sizes of a row's image.

        Args:
            row: Row in the cache.

        Returns:
            Original, resized and input size.
        """

        def pair(values: NDArray[Any]) -> tuple[int, int]:
            return int(values[0]), int(values[1])

        return ImageGeometry(
            pair(self._known("images/original_hw")[row]),
            pair(self._table("resized_hw")[row]),
            pair(self._table("input_hw")[row]),
        )

    def map_bytes(self, row: int) -> int:
        """Bytes of a row's maps before compression.

        Args:
            row: Row in the cache.

        Returns:
            Bytes, padding of chunks not counted.
        """
        total = 0
        for m in self.spec.maps:
            height, width = (int(v) for v in self._table(f"maps/{m.name}/hw")[row])
            total += height * width * m.channels * 2
        return total

    def ground_truth(self, row: int) -> GroundTruth:
        """The annotated objects of a row.

        Args:
            row: Row in the cache.

        Returns:
            The objects, masks as run lengths.
        """
        base = f"views/{BASE_VIEW}/ground_truth"
        first, last = (int(v) for v in self._known(f"{base}/offset")[row : row + 2])
        bounds = self._known(f"{base}/run_length_offset")[first : last + 1]
        runs: tuple[NDArray[np.uint32], ...] = ()
        if last > first:
            start, stop = int(bounds[0]), int(bounds[-1])
            # Read by slice: the run lengths of a whole dataset need not fit in memory.
            flat = np.asarray(self._group[f"{base}/run_length"][start:stop])  # type: ignore[index]
            runs = tuple(np.split(flat.astype(np.uint32), (bounds[1:-1] - start).tolist()))

        def column(name: str) -> NDArray[Any]:
            return self._known(f"{base}/{name}")[first:last]

        return GroundTruth(
            annotation_ids=column("annotation_id"),
            category_ids=column("category_id"),
            labels=column("label"),
            boxes_xyxy=column("box_xyxy"),
            areas=column("area"),
            is_crowd=column("is_crowd").astype(np.bool_),
            run_lengths=runs,
        )

    def read(self, row: int, map_names: tuple[str, ...] | None = None) -> CachedImage:
        """Everything stored for one row.

        Args:
            row: Row in the cache.
            map_names: Which maps to read; None reads all.

        Returns:
            The image as the detector saw it.

        Raises:
            CacheError: If the row has no content, or its bytes are damaged.
        """
        if self._table("status")[row] != ROW_OK:
            raise CacheError(f"{self.path}: row {row} has no content (skipped or not extracted)")
        if map_names is None:
            map_names = tuple(m.name for m in self.spec.maps)
        return CachedImage(
            row=row,
            image_id=self.image_id(row),
            file_name=self.file_name(row),
            geometry=self.geometry(row),
            class_logits=self._row_values("class_logits", row),
            boxes_cxcywh_norm=self._row_values("boxes_cxcywh_norm", row),
            queries=self._row_values("queries", row),
            maps={name: self._map_values(name, row) for name in map_names},
            ground_truth=self.ground_truth(row),
        )

    def _known(self, name: str) -> NDArray[Any]:
        """A small array that was written when the cache was created, kept in memory."""
        if name not in self._upfront:
            try:
                self._upfront[name] = np.asarray(self._group[name][...])  # type: ignore[index]
            except (KeyError, ValueError, OSError, RuntimeError) as error:
                raise CacheError(f"{self.path}: array {name} is damaged ({error})") from error
        return self._upfront[name]

    def _table(self, name: str) -> NDArray[Any]:
        """A column over all rows, read chunk by chunk; rows of missing parts are zero."""
        key = f"table:{name}"
        if key not in self._upfront:
            spec = self._arrays[name]
            full = np.zeros((self.layout.num_parts * spec.chunk[0], *spec.shape[1:]), spec.dtype)
            for part in range(self.layout.num_parts):
                if part in self.missing_parts:
                    continue
                file = self.path / spec.key_of_part(part)
                count = int(np.prod(spec.chunk))
                values = decode_chunk(file.read_bytes(), np.dtype(spec.dtype), count, str(file))
                full[part * spec.chunk[0] : (part + 1) * spec.chunk[0]] = values.reshape(spec.chunk)
            self._upfront[key] = full[: self.layout.num_rows]
        return self._upfront[key]

    @functools.lru_cache(maxsize=4096)  # noqa: B019  one cache object lives as long as its process
    def _shard(self, name: str, part: int) -> ShardReader:
        spec = self._arrays[name]
        return ShardReader.open(self.path / spec.key_of_part(part), spec.chunks_per_part)

    def _row_values(self, name: str, row: int) -> NDArray[Any]:
        part, index = divmod(row, self.layout.images_per_part)
        return self._chunks(name, part, index, 1).reshape(self._arrays[name].shape[1:])

    def _map_values(self, name: str, row: int) -> NDArray[Any]:
        key = f"maps/{name}/values"
        spec = self._arrays[key]
        height, width = (int(v) for v in self._table(f"maps/{name}/hw")[row])
        part = row // self.layout.images_per_part
        assert spec.shard is not None
        first = int(self._table(f"maps/{name}/offset")[row]) - part * spec.shard[0]
        count = -(-height * width // spec.chunk[0])
        tokens = self._chunks(key, part, first // spec.chunk[0], count)
        channels = spec.shape[1]
        return tokens[: height * width * channels].reshape(height, width, channels)

    def _chunks(self, name: str, part: int, first: int, count: int) -> NDArray[Any]:
        spec: ArraySpec = self._arrays[name]
        shard = self._shard(name, part)
        length, dtype = int(np.prod(spec.chunk)), np.dtype(spec.dtype)
        decoded = [
            decode_chunk(piece, dtype, length, f"{shard.path}, chunk {first + i}")
            for i, piece in enumerate(shard.read(first, count))
        ]
        return decoded[0] if count == 1 else np.concatenate(decoded)
