"""The bytes of a Zarr v3 shard: chunks compressed one by one, an index at the end, checksums.

Written here and not by zarr-python for three reasons: chunks are encoded while the detector runs
on the next image; a shard is published by one rename after an fsync; and a missing or torn chunk
is an error on reading, where zarr's readers return zeros. The result is plain ``sharding_indexed``
(inner codecs bytes, zstd, crc32c; index codecs bytes, crc32c; index at the end), and the tests
read every array with zarr-python.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from mfdetr_cache.errors import CacheError

ZSTD_LEVEL = 1
_EMPTY = 2**64 - 1
_CRC_BYTES = 4


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C of some bytes.

    Args:
        data: Any bytes.

    Returns:
        The checksum, as in RFC 3720.
    """
    value: int = google_crc32c.value(bytes(data))
    return value


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
    packed: bytes = plain.tobytes() if raw else Zstd(level=ZSTD_LEVEL).encode(plain)
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
    view = memoryview(data)
    if len(view) <= _CRC_BYTES:
        raise CacheError(f"{where} is cut off; {_AGAIN}")
    body = bytes(view[:-_CRC_BYTES])
    if struct.unpack("<I", view[-_CRC_BYTES:])[0] != google_crc32c.value(body):
        raise CacheError(f"{where} has a wrong checksum: its bytes changed on disk; {_AGAIN}")
    values = np.frombuffer(body if raw else Zstd().decode(body), dtype=dtype.newbyteorder("<"))
    if len(values) != count:
        raise CacheError(f"{where} holds {len(values)} values instead of {count}; {_AGAIN}")
    return values


_AGAIN = "mend it with: mfdetr cache repair"


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
    """Random access to the chunks of one shard file; safe to use from several threads.

    Attributes:
        path: The shard file.
        index: Offset and length of every chunk, shape (chunks, 2).
    """

    path: Path
    index: NDArray[np.uint64]

    @classmethod
    def open(cls, path: Path, num_chunks: int) -> "ShardReader":
        """Read and check a shard's index.

        Args:
            path: The shard file.
            num_chunks: How many chunks the array's metadata gives a shard.

        Returns:
            The reader.

        Raises:
            CacheError: If the file is missing, too short, or its index is damaged.
        """
        length = num_chunks * 16
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < length + _CRC_BYTES:
                    raise CacheError(f"{path} is cut off ({size} bytes); {_AGAIN}")
                file.seek(size - length - _CRC_BYTES)
                tail = file.read(length + _CRC_BYTES)
        except FileNotFoundError:
            raise CacheError(f"{path} is missing from the cache; {_AGAIN}") from None
        if struct.unpack("<I", tail[length:])[0] != crc32c(tail[:length]):
            raise CacheError(f"{path} has a damaged index; {_AGAIN}")
        return cls(path, np.frombuffer(tail[:length], dtype="<u8").reshape(num_chunks, 2))

    def read(self, first: int, count: int) -> list[memoryview]:
        """The encoded bytes of neighbouring chunks, in one read.

        Args:
            first: Index of the first chunk.
            count: How many chunks.

        Returns:
            One piece per chunk.

        Raises:
            CacheError: If a chunk was never written, or the file ends early.
        """
        entries = [(int(o), int(n)) for o, n in self.index[first : first + count]]
        if any(offset == _EMPTY for offset, _ in entries):
            raise CacheError(f"{self.path}: chunk {first} is missing; {_AGAIN}")
        start = min(offset for offset, _ in entries)
        stop = max(offset + size for offset, size in entries)
        with self.path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), stop - start, start)
        if len(data) != stop - start:
            raise CacheError(f"{self.path} is cut off; {_AGAIN}")
        view = memoryview(data)
        return [view[offset - start : offset - start + size] for offset, size in entries]


def publish(path: Path, pieces: list[bytes]) -> tuple[int, int]:
    """Write a file so that it is either absent or whole, even after a power cut.

    Args:
        path: Where it goes; folders are made as needed.
        pieces: Its bytes, in order.

    Returns:
        Size in bytes and CRC-32C of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    checksum = google_crc32c.Checksum()
    size = 0
    with partial.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            checksum.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return size, int.from_bytes(checksum.digest(), "big")
