"""The bytes of a Zarr v3 shard: chunks compressed one by one, checksums, an index at the end.

Written here and not by zarr-python for three reasons: chunks are encoded while the detector runs
on the next image; a shard is published by one rename after an fsync; and a missing or torn chunk
is an error on reading, where zarr's readers return zeros. The result is plain ``sharding_indexed``
(inner codecs bytes, zstd, crc32c; index codecs bytes, crc32c; index at the end), and the tests
read every array with zarr-python.

Between the chunks and the index stand the CRC-32C of all chunks, four bytes each, to which the
index does not point, so that Zarr readers pass over them. A chunk's own checksum says that the
chunk is whole; these say that it is the chunk which was written there. The manifest holds the hash
of both: a shard of another part, array or cache is refused when its index is read.
"""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c
from numcodecs.zstd import Zstd
from numcodecs.zstd import decompress as zstd_decompress
from numpy.typing import NDArray

from mfdetr_cache.cache.records import FileRecord
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import MEND, CacheError

ZSTD_LEVEL = 1
_ZSTD = Zstd(level=ZSTD_LEVEL)
_EMPTY = 2**64 - 1
CRC_BYTES = 4
# Of each chunk behind the chunks: its checksum, its offset, its length.
_TAIL_BYTES = CRC_BYTES + 16


def encode_chunk(values: NDArray[np.generic], *, raw: bool = False) -> bytes:
    """One chunk through the codecs bytes (little endian), zstd and crc32c."""
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

    ``where`` is file and chunk, for the message. CacheError if the checksum is wrong or there
    are not ``count`` values.
    """
    if len(data) <= CRC_BYTES:
        raise CacheError(f"{where} is cut off; {MEND}")
    # The checksum of anything followed by its own checksum is one constant: no slice is needed.
    if crc32c(data) != _CRC_RESIDUE:
        raise CacheError(f"{where} has a wrong checksum: its bytes changed on disk; {MEND}")
    body = memoryview(data)[:-CRC_BYTES]
    size = count * dtype.itemsize
    held = len(body) if raw else frame_bytes(body, 0)
    if held != size:
        raise CacheError(f"{where} holds {held} bytes instead of {size}; {MEND}")
    plain: NDArray[np.generic] = np.frombuffer(body, np.uint8) if raw else np.empty(size, np.uint8)
    if not raw:
        try:
            zstd_decompress(body, plain)
        except (RuntimeError, ValueError):
            raise CacheError(f"{where} cannot be decompressed; {MEND}") from None
    return plain.view(dtype.newbyteorder("<"))


_CRC_RESIDUE = 0x48674BC7
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_DICTIONARY_ID_BYTES = (0, 1, 2, 4)
_SIZE_BYTES = (0, 2, 4, 8)


def frame_bytes(data: memoryview, start: int) -> int:
    """How many bytes a zstd frame says it holds (RFC 8878, 3.1.1.1), to be asked before memory is.

    -1 if it is no frame that says it.
    """
    if len(data) < start + 6 or data[start : start + 4] != _ZSTD_MAGIC:
        return -1
    about = data[start + 4]
    is_single = about >> 5 & 1
    width = _SIZE_BYTES[about >> 6] or is_single
    at = start + 6 - is_single + _DICTIONARY_ID_BYTES[about & 3]
    size = int.from_bytes(data[at : at + width], "little") if width else -1
    return size + 256 if width == 2 else size


def decompress(data: memoryview) -> bytes:
    """A chunk, checksum included, through zstd alone: what reading is measured against."""
    plain: bytes = zstd_decompress(data[:-CRC_BYTES])
    return plain


class ShardBuilder:
    """Collects the encoded chunks of one shard in memory; those never added stay empty."""

    def __init__(self, num_chunks: int) -> None:
        self._chunks: list[bytes] = []
        self._checksums = np.zeros(num_chunks, dtype="<u4")
        self._sha256 = hashlib.sha256()
        self._index = np.full((num_chunks, 2), _EMPTY, dtype="<u8")
        self._size = 0

    def add(self, chunk_index: int, encoded: bytes) -> None:
        """Put a chunk, from :func:`encode_chunk`, at the end; its index is row-major."""
        self._index[chunk_index] = (self._size, len(encoded))
        self._checksums[chunk_index] = struct.unpack("<I", encoded[-CRC_BYTES:])[0]
        self._chunks.append(encoded)
        self._size += len(encoded)
        # Now and not when the part is sealed, which a detector on a GPU would have to wait for.
        self._sha256.update(encoded)

    def finish(self) -> tuple[list[bytes], FileRecord]:
        """Pieces of the shard in order, and what a manifest says of them.

        Chunks, their checksums, index, checksum of the index.
        """
        checksums, index = self._checksums.tobytes(), self._index.tobytes()
        tail = checksums + index + struct.pack("<I", crc32c(index))
        self._sha256.update(tail)
        index_sha256 = hashlib.sha256(tail).hexdigest()
        record = FileRecord(self._size + len(tail), self._sha256.hexdigest(), index_sha256)
        return [*self._chunks, tail], record


@dataclass(frozen=True)
class ShardReader:
    """Random access to the chunks of one shard; safe to use from several threads.

    Attributes:
        storage: Where it is.
        key: Its key there.
        index: Offset and length of every chunk, shape (chunks, 2).
        checksums: CRC-32C of every chunk, shape (chunks,).
    """

    storage: Storage
    key: str
    index: NDArray[np.uint64]
    checksums: NDArray[np.uint32]

    @classmethod
    def open(cls, storage: Storage, key: str, num_chunks: int, sha256: bytes) -> "ShardReader":
        """Read a shard's index; ``sha256``, from the manifest, is that of index and checksums.

        CacheError if the file is missing, too short, or its index is not what was written.
        """
        where = f"{storage.name}/{key}"
        length = num_chunks * _TAIL_BYTES + CRC_BYTES
        size = storage.size(key)
        if size is None:
            raise CacheError(f"{where} is missing from the cache; {MEND}")
        if size < length:
            raise CacheError(f"{where} is cut off ({size} bytes); {MEND}")
        tail = storage.read_ranges(key, [(size - length, length)])[0]
        # A damaged copy in a mirror is no damage of the cache: the source is asked once more.
        if hashlib.sha256(tail).digest() != sha256 and storage.forget(key):
            tail = storage.read_ranges(key, [(size - length, length)])[0]
        if hashlib.sha256(tail).digest() != sha256:
            raise CacheError(f"{where} has a damaged index or is another file; {MEND}")
        checksums = np.frombuffer(tail, dtype="<u4", count=num_chunks)
        index = np.frombuffer(tail, dtype="<u8", count=2 * num_chunks, offset=4 * num_chunks)
        index = index.reshape(num_chunks, 2)
        written = index[index[:, 0] != _EMPTY]
        room = np.uint64(size - length)
        if (written[:, 0] > room).any() or (written[:, 1] > room - written[:, 0]).any():
            raise CacheError(f"{where} has an index that points outside of it; {MEND}")
        return cls(storage, key, index, checksums)

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.storage.name}/{self.key}"

    def entries(self, first: int, count: int) -> list[tuple[int, int]]:
        """Where neighbouring chunks are; CacheError if one was never written."""
        entries: list[tuple[int, int]] = self.index[first : first + count].tolist()
        if any(offset == _EMPTY for offset, _ in entries):
            raise CacheError(f"{self.name}: chunk {first} is missing; {MEND}")
        return entries

    def read(self, first: int, count: int) -> list[bytes]:
        """The encoded bytes of neighbouring chunks.

        CacheError if a chunk was never written, or the file ends early.
        """
        entries = self.entries(first, count)
        try:
            pieces = self.storage.read_ranges(self.key, entries)
        except FileNotFoundError:
            raise CacheError(f"{self.name} is missing from the cache; {MEND}") from None
        if any(len(p) != size for p, (_, size) in zip(pieces, entries, strict=True)):
            raise CacheError(f"{self.name} is cut off; {MEND}")
        return pieces
