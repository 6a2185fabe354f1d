"""Arrays that were written at once: ids, names, transforms, annotations.

Read chunk by chunk with our own decoder: a chunk that is missing, damaged or that of another array
is an error here, where a Zarr reader returns what is there, and one image's objects cost a slice of
memory and not an event loop.
"""

import hashlib
import math
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.cache.arrays import ColumnSpec
from mfdetr_cache.cache.records import ColumnRecord
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.shards import decode_chunk
from mfdetr_cache.cache.storage.protocol import Storage, read_whole
from mfdetr_cache.errors import MEND, CacheError

# Chunks of run lengths kept decoded, 256 kB each.
_KEPT_CHUNKS = 64


class Columns:
    """Arrays that are chunked along their first axis only, by path inside the cache."""

    def __init__(
        self,
        storage: Storage,
        root: Root,
        record: ColumnRecord,
    ) -> None:
        self._storage = storage
        self._root = root
        self._lengths, self._files = record.lengths, record.files
        self._whole: dict[str, NDArray[Any]] = {}
        self._chunks: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, path: str) -> NDArray[Any]:
        """A whole array, kept in memory."""
        if path not in self._whole:
            self._whole[path] = self.slice(path, 0, self._length(path))
        return self._whole[path]

    def slice(self, path: str, start: int, stop: int) -> NDArray[Any]:
        """Rows of an array, without reading the others.

        CacheError if one of its chunks is missing or damaged.
        """
        spec = self._root.column(path)
        if stop <= start:
            return np.zeros((0, *spec.tail), spec.dtype)
        size = min(self._length(path), spec.chunk)
        first, last = start // size, (stop - 1) // size
        parts = [self._chunk(path, spec, number, size) for number in range(first, last + 1)]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        # A copy: decoded bytes are read-only, and torch warns about such arrays.
        return np.array(rows[start - first * size : stop - first * size])

    def bounds(self, offsets: str, values: str, index: int) -> tuple[int, int]:
        """Where the values of an item begin and end, from the column of their offsets.

        CacheError if the offsets do not divide the values up.
        """
        is_read = offsets in self._whole
        starts = self[offsets]
        if not is_read and (
            not len(starts)
            or starts[0] != 0
            or starts[-1] != self._length(values)
            or (np.diff(starts) < 0).any()
        ):
            del self._whole[offsets]
            raise CacheError(f"{self._storage.name}: {offsets} does not divide up {values}; {MEND}")
        return int(starts[index]), int(starts[index + 1])

    def _length(self, path: str) -> int:
        if path not in self._lengths:
            raise CacheError(f"{self._storage.name}: nothing is known of {path}; {MEND}")
        return self._lengths[path]

    def _chunk(self, path: str, spec: ColumnSpec, number: int, size: int) -> NDArray[Any]:
        key = (path, number)
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
                return self._chunks[key]
        key_in_store = "/".join([path, "c", str(number), *("0" for _ in spec.tail)])
        where = f"{self._storage.name}/{key_in_store}"
        sha256 = bytes.fromhex(self._files[key_in_store].sha256)
        data = read_checked(self._storage, key_in_store, sha256)
        values = decode_chunk(data, np.dtype(spec.dtype), size * math.prod(spec.tail), where)
        rows = values.reshape(size, *spec.tail)
        with self._lock:
            self._chunks[key] = rows
            while len(self._chunks) > _KEPT_CHUNKS:
                self._chunks.popitem(last=False)
        return rows


def read_checked(storage: Storage, key: str, sha256: bytes) -> bytes:
    """A small file whose hash is known; CacheError if it is missing or another."""
    where = f"{storage.name}/{key}"
    try:
        data = read_whole(storage, key, lambda data: hashlib.sha256(data).digest() == sha256)
    except FileNotFoundError:
        raise CacheError(f"{where} is missing from the cache; {MEND}") from None
    if hashlib.sha256(data).digest() != sha256:
        raise CacheError(f"{where} has a wrong checksum: it is not what was written; {MEND}")
    return data
