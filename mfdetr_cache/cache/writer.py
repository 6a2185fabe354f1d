"""Writes a cache part by part; a part is there whole or not at all.

A part is a fixed range of rows. Its arrays are built in memory, published one file after the
other, and counted only when its manifest has been published last. Parts do not depend on each
other, so what a killed run leaves is what an uninterrupted run would have written, minus parts.
"""

import contextlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.cache.creation import CacheContent, create_cache
from mfdetr_cache.cache.locks import locked
from mfdetr_cache.cache.manifest import manifest_key, whole_parts
from mfdetr_cache.cache.partition import WHOLE, Partition
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.schema import (
    ATTRIBUTES_KEY,
    C1_ROI,
    ROW_OK,
    ROW_SKIPPED,
    ArraySpec,
    Part,
    row_arrays,
    stored_maps,
)
from mfdetr_cache.cache.shards import ShardBuilder, encode_chunk
from mfdetr_cache.cache.storage.open import Location, open_storage
from mfdetr_cache.cache.storage.protocol import ROOT_KEY, Storage, explained
from mfdetr_cache.errors import CacheError
from mfdetr_cache.identity import differences
from mfdetr_cache.ops.quantisation import ENCODINGS, encode_map, fits_float16
from mfdetr_cache.types import C1Crops, DetectorOutput, ImageGeometry


@dataclass
class _OpenPart:
    """The arrays of the part that is being filled."""

    part: Part
    rows: range
    arrays: dict[str, ArraySpec]
    tables: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    shards: dict[str, ShardBuilder] = field(default_factory=dict)
    next_chunk: dict[str, int] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image as it will stand in the shards.

    Attributes:
        tables: What goes into the small arrays, by array.
        chunks: Encoded chunks by array, in order.
    """

    tables: dict[str, Any]
    chunks: dict[str, list[bytes]]

    @property
    def num_bytes(self) -> int:
        """Compressed bytes."""
        return sum(len(c) for chunks in self.chunks.values() for c in chunks)


class CacheWriter:
    """Fills a cache. Use :meth:`open_or_create`; holds its locks until :meth:`close`.

    Args:
        storage: Where the cache is.
        content: What the cache is of.
        partition: The parts it owns.
        locks: What is left when it is closed.
    """

    def __init__(
        self,
        storage: Storage,
        content: CacheContent,
        partition: Partition = WHOLE,
        locks: contextlib.ExitStack | None = None,
    ) -> None:
        self.storage = storage
        self._content = content
        self._locks = locks or contextlib.ExitStack()
        self._partition = partition
        layout = content.layout
        self._encoding = ENCODINGS[layout.preset]
        self._raw = layout.compression == "raw"
        self._arrays = {v: row_arrays(content.spec, layout, v) for v in layout.views}
        # Chunks are the same in every view.
        self._specs = next(iter(self._arrays.values()))
        self._open: _OpenPart | None = None

    @classmethod
    def open_or_create(
        cls, location: Location, content: CacheContent, partition: Partition = WHOLE
    ) -> "CacheWriter":
        """Begin a cache, or go on with one that the same command began.

        Args:
            location: Where the cache is or will be.
            content: What the cache is of.
            partition: Which of its parts this process fills.

        Returns:
            A writer that owns these parts. In a folder, locks see to it; in an object store there
            are none, and two writers of one part would write the same bytes twice.

        Raises:
            CacheError: If the place holds something else, a cache of other content, or parts that
                another process is writing, or cannot be written to.
        """
        storage = open_storage(location)
        with explained(storage):
            if storage.size(ROOT_KEY) is None:
                create_cache(storage, content)
            require_same_content(storage, content)
            # A cache keeps the parts it was created with, whatever this version would choose.
            content = replace(content, layout=FeatureCache.open(storage).layout)
        locks = contextlib.ExitStack()
        locks.enter_context(locked(storage, partition))
        return cls(storage, content, partition, locks)

    def close(self) -> None:
        """Give the cache back. A part that is not sealed is forgotten."""
        self._open = None
        self._locks.close()

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def pending_parts(self) -> list[Part]:
        """Its parts that are not whole: no manifest, or a file of another size than it says."""
        parts = tuple(self._partition.of(self._content.layout.parts))
        whole = whole_parts(self.storage, parts)
        return [p for p in parts if p not in whole]

    @property
    def num_rows(self) -> int:
        """Rows of all parts this writer owns."""
        parts = self._partition.of(self._content.layout.parts)
        return sum(len(self.rows_of_part(part)) for part in parts)

    def rows_of_part(self, part: Part) -> range:
        """The rows of one part.

        Args:
            part: The part.

        Returns:
            Consecutive rows.
        """
        return self._content.layout.rows_of_part(part.number)

    def begin_part(self, part: Part) -> None:
        """Start filling a part; every one of its rows is then appended or skipped.

        Args:
            part: The part.
        """
        opened = _OpenPart(part, self.rows_of_part(part), self._arrays[part.view])
        for name, spec in opened.arrays.items():
            if spec.shard is None:
                opened.tables[name] = np.zeros(spec.chunk, dtype=spec.dtype)
            else:
                opened.shards[name] = ShardBuilder(spec.chunks_per_part)
                if self._is_running(name):
                    opened.next_chunk[name] = 0
        self._open = opened

    def append(
        self,
        row: int,
        geometry: ImageGeometry,
        output: DetectorOutput,
        crops: C1Crops | None = None,
    ) -> int:
        """Encode one image and add it to the open part.

        Args:
            row: Its row, in the open part.
            geometry: How the image became the input.
            output: The detector's output for a batch of this one image, on the CPU.
            crops: Crops of C1, where the layout keeps these in place of the map.

        Returns:
            Compressed bytes added.

        Raises:
            ValueError: If an array has another shape than declared.
            CacheError: If a value is not finite, in the detector or after rounding to float16.
        """
        return self.add(row, self.encode(row, geometry, output, crops))

    def encode(
        self,
        row: int,
        geometry: ImageGeometry,
        output: DetectorOutput,
        crops: C1Crops | None = None,
    ) -> EncodedImage:
        """Quantise and compress one image; from any number of threads.

        Args:
            row: Its row, for messages.
            geometry: How the image became the input.
            output: The detector's output for a batch of this one image, on the CPU.
            crops: Crops of C1, where the layout keeps these in place of the map.

        Returns:
            What :meth:`add` takes.

        Raises:
            ValueError: If an array has another shape than declared.
            CacheError: If a value is not finite, in the detector or after rounding to float16.
        """
        image = EncodedImage({}, {})
        image.tables["status"] = ROW_OK
        image.tables["resized_hw"] = geometry.resized_hw
        image.tables["input_hw"] = geometry.input_hw
        for name in ("class_logits", "boxes_cxcywh_norm", "queries"):
            self._encode_row(image, name, getattr(output, name)[0].numpy(), row)
        for spec in stored_maps(self._content.spec, self._content.layout):
            if spec.role != "c1_roi":
                self._encode_map(image, spec.name, output.maps[spec.name][0].numpy(), row)
        if self._content.layout.c1_roi is not None:
            if crops is None:
                raise ValueError(f"row {row} has no crops of C1, which the layout asks for")
            self._encode_crops(image, crops, row)
        return image

    def add(self, row: int, image: EncodedImage) -> int:
        """Add one image to the open part. Nothing is visible to readers before it is sealed.

        Args:
            row: Its row, in the open part.
            image: From :meth:`encode`.

        Returns:
            Compressed bytes added.

        Raises:
            ValueError: If its maps are larger than planned.
        """
        part = self._require_open()
        index = row - part.rows.start
        for name, values in image.tables.items():
            part.tables[name][index] = values
        for name, chunks in image.chunks.items():
            spec = part.arrays[name]
            first = index
            if name in part.next_chunk:
                first = part.next_chunk[name]
                part.next_chunk[name] = first + len(chunks)
                if first + len(chunks) > spec.chunks_per_part:
                    raise ValueError(f"{name} of row {row} is larger than planned")
            if name.endswith("/values"):
                assert spec.shard is not None
                place = part.part.number * spec.shard[0] + first * spec.chunk[0]
                part.tables[f"{name.removesuffix('values')}offset"][index] = place
            for number, chunk in enumerate(chunks):
                part.shards[name].add(first + number, chunk)
        return image.num_bytes

    def skip(self, row: int, reason: str) -> None:
        """Leave one row without content.

        Args:
            row: Its row, in the open part.
            reason: Why, kept in the manifest.
        """
        part = self._require_open()
        part.tables["status"][row - part.rows.start] = ROW_SKIPPED
        image_id = self._content.image_ids[row]
        part.skipped.append({"row": row, "image_id": image_id, "reason": reason})

    def seal_part(self) -> int:
        """Publish the open part: its files, then its manifest.

        Returns:
            Bytes written.

        Raises:
            CacheError: If the disk is full or cannot be written; what was sealed before stays.
        """
        part = self._require_open()
        files: dict[str, dict[str, int]] = {}
        with explained(self.storage):
            for name, spec in part.arrays.items():
                key = spec.key_of_part(part.part.number)
                if spec.shard is None:
                    pieces = [encode_chunk(part.tables[name], raw=self._raw)]
                else:
                    pieces = part.shards[name].finish()
                size, checksum = self.storage.write(key, pieces)
                files[key] = {"bytes": size, "crc32c": checksum}
            manifest = {
                "view": part.part.view,
                "part": part.part.number,
                "rows": [part.rows.start, part.rows.stop],
                "skipped": part.skipped,
                "files": files,
            }
            text = json.dumps(manifest, indent=1, sort_keys=True)
            self.storage.write(manifest_key(part.part), [text.encode()])
        self._open = None
        return sum(f["bytes"] for f in files.values())

    def _is_running(self, name: str) -> bool:
        """Whether an array's chunks follow one another, and are not one an image."""
        blocks = bool(self._encoding.block_tokens)
        return name.endswith("/values") or (blocks and name.endswith("/affine"))

    def _require_open(self) -> _OpenPart:
        if self._open is None:
            raise ValueError("no part is open; call begin_part first")
        return self._open

    def _encode_row(self, image: EncodedImage, name: str, values: NDArray[Any], row: int) -> None:
        """An array that has one chunk an image."""
        spec = self._specs[name]
        if values.shape != spec.shape[1:]:
            raise ValueError(f"{name} of row {row} is {values.shape}, declared {spec.shape[1:]}")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values[None], dtype=spec.dtype)
        if not np.isfinite(stored).all():
            raise _not_finite(values, row, name, stored.dtype)
        image.chunks[name] = [self._encode_chunk(name, stored)]

    def _encode_chunk(self, name: str, values: NDArray[np.generic]) -> bytes:
        """One chunk, filled up with zeros to its full size."""
        chunk = self._specs[name].chunk
        if values.shape != chunk:
            padded = np.zeros(chunk, dtype=values.dtype)
            padded[: len(values)] = values
            values = padded
        return encode_chunk(values, raw=self._raw)

    def _encode_crops(self, image: EncodedImage, crops: C1Crops, row: int) -> None:
        most = self._specs[f"{C1_ROI}/query_index"].shape[1]
        queries = np.full(most, -1, dtype=np.int32)
        queries[: len(crops.query_index)] = crops.query_index
        image.tables[f"{C1_ROI}/c1_hw"] = crops.c1_hw
        self._encode_row(image, f"{C1_ROI}/query_index", queries, row)
        self._encode_row(image, f"{C1_ROI}/moments", crops.moments, row)
        values = np.asarray(crops.crops.to_array(), dtype=np.float32).transpose(2, 0, 1)
        self._encode_map(image, C1_ROI, values, row)

    def _encode_map(self, image: EncodedImage, name: str, values: NDArray[Any], row: int) -> None:
        """Cut a (C, h, w) map into chunks of tokens; the last chunk is padded with zeros."""
        base = f"maps/{name}"
        spec = self._specs[f"{base}/values"]
        channels, height, width = values.shape
        if channels != spec.attributes["channels"]:
            raise ValueError(
                f"map {name} of row {row} has {channels} channels, "
                f"not {spec.attributes['channels']}"
            )
        planes = np.ascontiguousarray(values, dtype=np.float32).reshape(channels, height * width)
        if not fits_float16(planes):
            raise _not_finite(values, row, f"map {name}", np.dtype(np.float16))
        stored, affine = encode_map(planes.T, self._encoding)
        step = spec.chunk[0]
        starts = range(0, len(stored), step)
        image.tables[f"{base}/hw"] = (height, width)
        image.chunks[f"{base}/values"] = [
            self._encode_chunk(f"{base}/values", stored[i : i + step]) for i in starts
        ]
        if affine is not None:
            # Of every chunk; where a map has one scale, of the image.
            block = self._encoding.block_tokens
            pieces = (
                [affine[i // block : (i + step) // block] for i in starts] if block else [affine]
            )
            image.chunks[f"{base}/affine"] = [
                self._encode_chunk(f"{base}/affine", p) for p in pieces
            ]


def _not_finite(
    values: NDArray[Any], row: int, name: str, dtype: np.dtype[np.generic]
) -> CacheError:
    largest = float(np.nanmax(np.abs(values)))
    return CacheError(
        f"{name} of row {row} is not finite as {dtype} (largest value {largest:.3g}); "
        "the detector or its input is broken"
    )


def require_same_content(storage: Storage, content: CacheContent) -> None:
    """Refuse to write into a cache of something else.

    Args:
        storage: Where the cache is.
        content: What would be written.

    Raises:
        CacheError: Naming the field that differs, or if there is no cache.
    """
    try:
        attributes = json.loads(storage.read(ROOT_KEY))["attributes"][ATTRIBUTES_KEY]
        identity = attributes["identity"]
    except (ValueError, KeyError, TypeError):
        raise CacheError(f"{storage.name} is no feature cache; choose another --cache") from None
    found = differences(identity, json.loads(json.dumps(content.identity)))
    if found:
        field_name, theirs, ours = found[0]
        raise CacheError(
            f"{storage.name} already holds another cache: {field_name} is {theirs!r} there and "
            f"{ours!r} now; nothing was changed, choose another --cache"
        )
