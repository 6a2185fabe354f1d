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

from mfdetr_cache.errors import MEND, CacheError

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
    data: bytes,
    dtype: np.dtype[np.generic],
    count: int,
    where: str,
    *,
    raw: bool = False,
    out: NDArray[np.generic] | None = None,
) -> NDArray[np.generic]:
    """The values of one chunk; the inverse of :func:`encode_chunk`.

    Args:
        data: The chunk's bytes, checksum included.
        dtype: Type of the values.
        count: How many values there must be.
        where: File and chunk, for the message.
        raw: The chunk was written without zstd.
        out: Where the values go, flat and contiguous; None makes an array.

    Returns:
        The values, flat.

    Raises:
        CacheError: If the checksum is wrong or the length is not what it must be.
    """
    if len(data) <= _CRC_BYTES:
        raise CacheError(f"{where} is cut off; {MEND}")
    # The checksum of anything followed by its own checksum is one constant: no slice is needed.
    if google_crc32c.value(data) != _CRC_RESIDUE:
        raise CacheError(f"{where} has a wrong checksum: its bytes changed on disk; {MEND}")
    body = memoryview(data)[:-_CRC_BYTES]
    size = count * dtype.itemsize
    if raw:
        found: NDArray[np.generic] = np.frombuffer(body, dtype=np.uint8)
    elif out is not None:
        found = np.frombuffer(Zstd().decode(body, out=out.view(np.uint8)), dtype=np.uint8)
    else:
        found = np.frombuffer(Zstd().decode(body), dtype=np.uint8)
    if len(found) != size:
        raise CacheError(f"{where} holds {len(found)} bytes instead of {size}; {MEND}")
    values = found.view(dtype.newbyteorder("<"))
    if out is None:
        return values
    if raw:
        out[...] = values
    return out


_CRC_RESIDUE = 0x48674BC7


def decompress(data: memoryview) -> bytes:
    """A chunk through zstd and nothing else: the floor that reading is measured against.

    Args:
        data: The chunk's bytes, checksum included.

    Returns:
        Its bytes.
    """
    plain: bytes = Zstd().decode(data[:-_CRC_BYTES])
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
                    raise CacheError(f"{path} is cut off ({size} bytes); {MEND}")
                file.seek(size - length - _CRC_BYTES)
                tail = file.read(length + _CRC_BYTES)
        except FileNotFoundError:
            raise CacheError(f"{path} is missing from the cache; {MEND}") from None
        if struct.unpack("<I", tail[length:])[0] != crc32c(tail[:length]):
            raise CacheError(f"{path} has a damaged index; {MEND}")
        return cls(path, np.frombuffer(tail[:length], dtype="<u8").reshape(num_chunks, 2))

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
        entries = [(int(o), int(n)) for o, n in self.index[first : first + count]]
        if any(offset == _EMPTY for offset, _ in entries):
            raise CacheError(f"{self.path}: chunk {first} is missing; {MEND}")
        # One read per chunk, so that no byte is copied again; neighbours are asked for ahead.
        with self.path.open("rb", buffering=0) as file:
            descriptor = file.fileno()
            if count > 1 and hasattr(os, "posix_fadvise"):
                start, stop = entries[0][0], entries[-1][0] + entries[-1][1]
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)
            pieces = [os.pread(descriptor, size, offset) for offset, size in entries]
        if any(len(piece) != size for piece, (_, size) in zip(pieces, entries, strict=True)):
            raise CacheError(f"{self.path} is cut off; {MEND}")
        return pieces


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
