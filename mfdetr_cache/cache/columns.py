"""The arrays a cache got when it was created: ids, names, transforms, ground truth.

Read chunk by chunk with our own decoder: a missing or damaged chunk is an error here, where a Zarr
reader returns zeros, and one image's ground truth costs a slice of memory and not an event loop.
"""

import json
import math
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.cache.shards import decode_chunk
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import MEND, CacheError

# Chunks of run lengths kept decoded, 256 kB each.
_KEPT_CHUNKS = 64


class Columns:
    """Arrays that are chunked along their first axis only, by path inside the cache.

    Args:
        storage: Where the cache is.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._whole: dict[str, NDArray[Any]] = {}
        self._about: dict[str, tuple[tuple[int, ...], int, np.dtype[Any]]] = {}
        self._chunks: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A whole array, kept in memory."""
        if name not in self._whole:
            self._whole[name] = self.slice(name, 0, self._describe(name)[0][0])
        return self._whole[name]

    def slice(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows of an array, without reading the others.

        Args:
            name: Path of the array inside the cache.
            start: First row.
            stop: Row after the last.

        Returns:
            The rows.

        Raises:
            CacheError: If the array or one of its chunks is missing or damaged.
        """
        shape, length, dtype = self._describe(name)
        if stop <= start:
            return np.zeros((0, *shape[1:]), dtype)
        first, last = start // length, (stop - 1) // length
        parts = [self._chunk(name, number) for number in range(first, last + 1)]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        # A copy: decoded bytes are read-only, and torch warns about such arrays.
        return np.array(rows[start - first * length : stop - first * length])

    def _describe(self, name: str) -> tuple[tuple[int, ...], int, np.dtype[Any]]:
        """Shape, chunk length and type of an array."""
        if name not in self._about:
            try:
                about = json.loads(self._storage.read(f"{name}/zarr.json"))
                shape = tuple(int(s) for s in about["shape"])
                length = int(about["chunk_grid"]["configuration"]["chunk_shape"][0])
                self._about[name] = (shape, length, np.dtype(about["data_type"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CacheError(
                    f"{self._storage.name}: array {name} is damaged; {MEND}"
                ) from error
        return self._about[name]

    def _chunk(self, name: str, number: int) -> NDArray[Any]:
        key = (name, number)
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
                return self._chunks[key]
        shape, length, dtype = self._describe(name)
        key_in_store = "/".join([name, "c", str(number), *("0" for _ in shape[1:])])
        where = f"{self._storage.name}/{key_in_store}"
        try:
            data = self._storage.read(key_in_store)
        except OSError:
            raise CacheError(f"{where} is missing from the cache; {MEND}") from None
        values = decode_chunk(data, dtype, length * math.prod(shape[1:]), where)
        rows = values.reshape(length, *shape[1:])
        with self._lock:
            self._chunks[key] = rows
            while len(self._chunks) > _KEPT_CHUNKS:
                self._chunks.popitem(last=False)
        return rows
