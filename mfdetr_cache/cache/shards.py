"""The bytes of a Zarr v3 shard: chunks compressed one by one, an index at the end, checksums.

Written here and not by zarr-python for three reasons: chunks are encoded while the detector runs
on the next image; a shard is published by one rename after an fsync; and a missing or torn chunk
is an error on reading, where zarr's readers return zeros. The result is plain ``sharding_indexed``
(inner codecs bytes, zstd, crc32c; index codecs bytes, crc32c; index at the end), and the tests
read every array with zarr-python.
"""

import struct
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c
from numcodecs.zstd import Zstd
from numcodecs.zstd import decompress as zstd_decompress
from numpy.typing import NDArray

from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import MEND, CacheError

ZSTD_LEVEL = 1
_ZSTD = Zstd(level=ZSTD_LEVEL)
_EMPTY = 2**64 - 1
CRC_BYTES = 4


def encode_chunk(values: NDArray[np.generic], *, raw: bool = False) -> bytes:
    """One chunk through the codecs bytes (little endian), zstd and crc32c.

    Args:
        values: The whole chunk.
        raw: Leave zstd out.

    Returns:
        Its bytes as they stand in a shard.
    """
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    plain = np.ascontiguousarray(little)
    packed: bytes = plain.tobytes() if raw else _ZSTD.encode(plain)
    return packed + struct.pack("<I", crc32c(packed))


def decode_chunk(
    data: bytes | memoryview,
    dtype: np.dtype[np.generic],
    count: int,
    where: str,
    *,
    raw: bool = False,
) -> NDArray[np.generic]:
    """The values of one chunk; the inverse of :func:`encode_chunk`.

    Args:
        data: The chunk's bytes, checksum included.
        dtype: Type of the values.
        count: How many values there must be.
        where: File and chunk, for the message.
        raw: The chunk was written without zstd.

    Returns:
        The values, flat.

    Raises:
        CacheError: If the checksum is wrong or the length is not what it must be.
    """
    if len(data) <= CRC_BYTES:
        raise CacheError(f"{where} is cut off; {MEND}")
    # The checksum of anything followed by its own checksum is one constant: no slice is needed.
    if crc32c(data) != _CRC_RESIDUE:
        raise CacheError(f"{where} has a wrong checksum: its bytes changed on disk; {MEND}")
    body = memoryview(data)[:-CRC_BYTES]
    size = count * dtype.itemsize
    if raw:
        found: NDArray[np.generic] = np.frombuffer(body, dtype=np.uint8)
    else:
        found = np.frombuffer(zstd_decompress(body), dtype=np.uint8)
    if len(found) != size:
        raise CacheError(f"{where} holds {len(found)} bytes instead of {size}; {MEND}")
    return found.view(dtype.newbyteorder("<"))


_CRC_RESIDUE = 0x48674BC7


def decompress(data: memoryview) -> bytes:
    """A chunk through zstd and nothing else: the floor that reading is measured against.

    Args:
        data: The chunk's bytes, checksum included.

    Returns:
        Its bytes.
    """
    plain: bytes = zstd_decompress(data[:-CRC_BYTES])
    return plain


class ShardBuilder:
    """Collects the encoded chunks of one shard in memory.

    Args:
        num_chunks: How many chunks the shard has room for; those never added stay empty.
    """

    def __init__(self, num_chunks: int) -> None:
        self._chunks: list[bytes] = []
        self._index = np.full((num_chunks, 2), _EMPTY, dtype="<u8")
        self._size = 0

    def add(self, chunk_index: int, encoded: bytes) -> None:
        """Put one chunk at the end of the shard.

        Args:
            chunk_index: Its place in the shard, row-major.
            encoded: Its bytes, from :func:`encode_chunk`.
        """
        self._index[chunk_index] = (self._size, len(encoded))
        self._chunks.append(encoded)
        self._size += len(encoded)

    def finish(self) -> list[bytes]:
        """The shard's bytes in order: chunks, index, checksum of the index.

        Returns:
            Pieces to be written one after the other.
        """
        index = self._index.tobytes()
        return [*self._chunks, index, struct.pack("<I", crc32c(index))]


@dataclass(frozen=True)
class ShardReader:
    """Random access to the chunks of one shard; safe to use from several threads.

    Attributes:
        storage: Where it is.
        key: Its key there.
        index: Offset and length of every chunk, shape (chunks, 2).
    """

    storage: Storage
    key: str
    index: NDArray[np.uint64]

    @classmethod
    def open(cls, storage: Storage, key: str, num_chunks: int) -> "ShardReader":
        """Read and check a shard's index.

        Args:
            storage: Where it is.
            key: Its key there.
            num_chunks: How many chunks the array's metadata gives a shard.

        Returns:
            The reader.

        Raises:
            CacheError: If the file is missing, too short, or its index is damaged.
        """
        where = f"{storage.name}/{key}"
        length = num_chunks * 16 + CRC_BYTES
        size = storage.size(key)
        if size is None:
            raise CacheError(f"{where} is missing from the cache; {MEND}")
        if size < length:
            raise CacheError(f"{where} is cut off ({size} bytes); {MEND}")
        index = _read_index(storage, key, size - length, length)
        # A damaged copy in a mirror is no damage of the cache: the source is asked once more.
        if index is None and storage.forget(key):
            index = _read_index(storage, key, size - length, length)
        if index is None:
            raise CacheError(f"{where} has a damaged index; {MEND}")
        return cls(storage, key, index)

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.storage.name}/{self.key}"

    def entries(self, first: int, count: int) -> list[tuple[int, int]]:
        """Where neighbouring chunks are.

        Args:
            first: Index of the first chunk.
            count: How many chunks.

        Returns:
            Offset and length of each.

        Raises:
            CacheError: If a chunk was never written.
        """
        found: list[tuple[int, int]] = self.index[first : first + count].tolist()
        if any(offset == _EMPTY for offset, _ in found):
            raise CacheError(f"{self.name}: chunk {first} is missing; {MEND}")
        return found

    def read(self, first: int, count: int) -> list[bytes]:
        """The encoded bytes of neighbouring chunks.

        Args:
            first: Index of the first chunk.
            count: How many chunks.

        Returns:
            One piece per chunk.

        Raises:
            CacheError: If a chunk was never written, or the file ends early.
        """
        entries = self.entries(first, count)
        try:
            pieces = self.storage.read_ranges(self.key, entries)
        except FileNotFoundError:
            raise CacheError(f"{self.name} is missing from the cache; {MEND}") from None
        if any(len(p) != size for p, (_, size) in zip(pieces, entries, strict=True)):
            raise CacheError(f"{self.name} is cut off; {MEND}")
        return pieces


def _read_index(storage: Storage, key: str, start: int, length: int) -> NDArray[np.uint64] | None:
    """A shard's index; None where its checksum is wrong."""
    tail = storage.read_ranges(key, [(start, length)])[0]
    entries, checksum = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
    if checksum != struct.pack("<I", crc32c(entries)):
        return None
    return np.frombuffer(entries, dtype="<u8").reshape(-1, 2)
