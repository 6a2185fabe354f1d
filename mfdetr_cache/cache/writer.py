"""Writes a cache part by part; a part is there whole or not at all.

A part is a fixed range of rows. Its arrays are built in memory, published one file after the
other, and counted only when its manifest has been published last. Parts do not depend on each
other, so what a killed run leaves is what an uninterrupted run would have written, minus parts.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.cache.annotations import read_annotations, version_numbers
from mfdetr_cache.cache.arrays import ArraySpec
from mfdetr_cache.cache.creation import CacheContent, create_cache
from mfdetr_cache.cache.encoder import EncodedImage, ImageEncoder
from mfdetr_cache.cache.foundation import read_root
from mfdetr_cache.cache.locks import locked
from mfdetr_cache.cache.manifest import Manifest, sizes_of_images, whole_parts, write_manifest
from mfdetr_cache.cache.partition import WHOLE, Partition
from mfdetr_cache.cache.records import FileRecord
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import ROW_SKIPPED, Part
from mfdetr_cache.cache.shards import ShardBuilder, encode_chunk
from mfdetr_cache.cache.storage.open import Location, open_storage
from mfdetr_cache.cache.storage.protocol import ROOT_KEY, Storage, explained
from mfdetr_cache.errors import CacheError
from mfdetr_cache.identity import differences


@dataclass
class OpenPart:
    """The arrays of a part that is being filled, or waits to be published."""

    part: Part
    rows: range
    arrays: dict[str, ArraySpec]
    tables: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    shards: dict[str, ShardBuilder] = field(default_factory=dict)
    next_chunk: dict[str, int] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    image_bytes: dict[int, int] = field(default_factory=dict)


class CacheWriter:
    """Fills a cache. Use :meth:`open_or_create`; holds its locks until :meth:`close`.

    Its ``encoder`` makes what :meth:`add` takes, in any thread.
    """

    def __init__(
        self,
        storage: Storage,
        content: CacheContent,
        partition: Partition = WHOLE,
        locks: contextlib.ExitStack | None = None,
    ) -> None:
        self.storage = storage
        self.content = content
        self._locks = locks or contextlib.ExitStack()
        self._partition = partition
        self._root = content.root
        self.encoder = ImageEncoder(self._root)
        self._raw = self._root.layout.compression == "raw"
        self._open: OpenPart | None = None
        # Of the parts that `pending_parts` found whole.
        self.sizes_of_images: list[tuple[int, int]] = []

    @classmethod
    def open_or_create(
        cls, location: Location, content: CacheContent, partition: Partition = WHOLE
    ) -> "CacheWriter":
        """Begin a cache, or go on with one that the same command began.

        The writer owns the parts of its partition. In a folder, locks see to it; in an object store
        there are none, and two writers of one part would write the same bytes twice. CacheError if
        the place holds something else, a cache of other content, or parts that another process is
        writing, or cannot be written to.
        """
        storage = open_storage(location)
        if storage.annotations is not None:
            raise CacheError(
                f"{location}: @{storage.annotations} chooses annotations to read; to write, give "
                f"{storage.name}"
            )
        with explained(storage):
            if storage.size(ROOT_KEY) is None:
                create_cache(storage, content)
            root = read_root(storage)
            require_same_content(storage, root, content)
        # A cache keeps the parts it was created with, whatever this version would choose.
        content = replace(content, root=root)
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
        parts = self._partition.of(self._root.layout.parts)
        whole = whole_parts(self.storage, self._root, parts)
        self.sizes_of_images = sizes_of_images(self._root, whole)
        return [p for p in parts if p not in whole]

    @property
    def num_rows(self) -> int:
        """Rows of all parts this writer owns."""
        parts = self._partition.of(self._root.layout.parts)
        return sum(len(self.rows_of_part(part)) for part in parts)

    def rows_of_part(self, part: Part) -> range:
        """The rows of one part."""
        return self._root.layout.rows_of_part(part.number)

    def begin_part(self, part: Part) -> None:
        """Start filling a part; every one of its rows is then appended or skipped."""
        opened = OpenPart(part, self.rows_of_part(part), self._root.arrays[part.view])
        for name, spec in opened.arrays.items():
            if spec.shard is None:
                opened.tables[name] = np.zeros(spec.chunk, dtype=spec.dtype)
            else:
                opened.shards[name] = ShardBuilder(spec.chunks_per_part)
                # Chunks of tokens follow one another; others are one for each row.
                if spec.dimension_names[0] != "row":
                    opened.next_chunk[name] = 0
        self._open = opened

    def add(self, row: int, image: EncodedImage, file_bytes: int = 0) -> int:
        """Add one image to the open part, which no reader sees yet, and return the bytes added.

        ``file_bytes`` is the size of its file.
        ValueError if its maps are larger than planned.
        """
        part = self._require_open()
        index = row - part.rows.start
        part.image_bytes[row] = file_bytes
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
        """Leave one row without content."""
        part = self._require_open()
        part.tables["status"][row - part.rows.start] = ROW_SKIPPED
        image_id = self.content.images[row].image_id
        part.skipped.append({"row": row, "image_id": image_id, "reason": reason})

    def seal_part(self) -> int:
        """End the open part and :meth:`publish` it; returns the bytes written."""
        return self.publish(self.end_part())

    def end_part(self) -> OpenPart:
        """The open part, filled; another one can be begun before it is published."""
        part, self._open = self._require_open(), None
        return part

    def publish(self, part: OpenPart) -> int:
        """Write a part's files, then its manifest, in any thread; returns the bytes written.

        CacheError if the disk is full or cannot be written; what was sealed before stays.
        """
        files: dict[str, FileRecord] = {}
        with explained(self.storage):
            for name, spec in part.arrays.items():
                key = spec.key_of_part(part.part.number)
                if spec.shard is None:
                    chunk = encode_chunk(part.tables[name], raw=self._raw)
                    pieces, files[key] = [chunk], FileRecord.of(chunk)
                else:
                    pieces, files[key] = part.shards[name].finish()
                self.storage.write(key, pieces)
            image_bytes = tuple(part.image_bytes.get(row, 0) for row in part.rows)
            manifest = Manifest(part.part, tuple(part.skipped), files, image_bytes)
            write_manifest(self.storage, self._root, manifest)
        return sum(f.num_bytes for f in files.values())

    def _require_open(self) -> OpenPart:
        if self._open is None:
            raise ValueError("no part is open; call begin_part first")
        return self._open


def require_same_content(storage: Storage, root: Root, content: CacheContent) -> None:
    """Refuse to write into a cache of something else.

    The CacheError names the field that differs, or whose annotations the cache has.
    """
    require_same_features(storage, root, content)
    # Crops of C1 were chosen by the first annotations; nothing else of the features hangs on them.
    numbers = (0,) if root.layout.c1 == "roi" else version_numbers(storage)
    known = [read_annotations(storage, root, number) for number in numbers]
    if not any(record.is_of(content.labels) for record in known):
        raise other_annotations(storage, [str(record.source["name"]) for record in known])


def other_annotations(storage: Storage, names: Sequence[str]) -> CacheError:
    """The refusal of annotations that a cache does not have."""
    return CacheError(
        f"{storage.name} holds these features with the annotations {' and '.join(names)}, and not "
        "with those given now; nothing was changed. New annotations are put beside the features "
        "with: mfdetr cache relabel"
    )


def require_same_features(storage: Storage, root: Root, content: CacheContent) -> None:
    """The same but for annotations."""
    changed = differences(json.loads(json.dumps(content.root.identity)), root.identity)
    if changed:
        field_name, ours, theirs = changed[0]
        raise CacheError(
            f"{storage.name} already holds another cache: {field_name} is {theirs!r} there and "
            f"{ours!r} now; nothing was changed, choose another --cache"
        )
