"""Chunks of several arrays, read, checked and decoded together.

A reader's threads share one GIL with the training. Every call that lets go of it has to get it back
afterwards, which beside a training on a GPU takes tens of microseconds from both; an image has some
fifty chunks in a dozen files. Here each file is read by one call, straight to where its bytes are
wanted, and all chunks are checked and decompressed by one call each; where no GPU waits, some
megabytes at a time.
"""

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from crc32c import crc32c
from numcodecs.zstd import decompress as zstd_decompress
from numpy.typing import NDArray

from mfdetr_cache.cache.shards import CRC_BYTES, ShardReader, decode_chunk, frame_bytes
from mfdetr_cache.errors import MEND, CacheError

_BYTES = np.dtype(np.uint8)
# Decoded bytes that are read, checked and decompressed at a time where no GPU waits: encoded bytes
# are then still in the processor's cache when they are decompressed, and a disk reads on meanwhile.
_IN_CACHE = 4 * 2**20
_KEPT = threading.local()


@dataclass(frozen=True, slots=True)
class ChunkRun:
    """Neighbouring chunks of one shard, each of ``length`` values."""

    shard: ShardReader
    first: int
    count: int
    length: int
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return self.count * self.chunk_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the values of a chunk."""
        return self.length * self.dtype.itemsize

    @property
    def entries(self) -> list[tuple[int, int]]:
        """Offset and size of each chunk in its file; they follow one another."""
        return self.shard.entries(self.first, self.count)

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """CRC-32C of each chunk."""
        return self.shard.checksums[self.first : self.first + self.count]


def read_chunks(
    runs: Sequence[ChunkRun], *, raw: bool = False, pinned: bool = False
) -> list[NDArray[Any]]:
    """The values of each run, flat; views of one array.

    ``raw`` chunks were written without zstd; ``pinned`` decodes into memory that a GPU copies
    from by itself. CacheError, naming file and chunk, if one is missing or damaged.
    """
    if not runs:
        return []
    # The widest types first: every array then begins where its type may.
    order = sorted(range(len(runs)), key=lambda i: -runs[i].dtype.itemsize)
    ordered = [runs[i] for i in order]
    total = sum(run.num_bytes for run in runs)
    out: NDArray[Any] = np.empty(0 if pinned else total, np.uint8)
    if pinned:
        # Imported late: torch takes seconds, and a cache can be read without it.
        from mfdetr_cache.ops.devices import pinned_array

        out = pinned_array(total, _BYTES)
    end = 0
    for stretch in _stretches(ordered, total if pinned else _IN_CACHE):
        first, end = end, end + sum(run.num_bytes for run in stretch)
        if not _filled(out[first:end], stretch, raw=raw):
            _fill_again(out[first:end], stretch, raw=raw)
    arrays: list[NDArray[Any]] = [out] * len(runs)
    end = 0
    for i in order:
        first, end = end, end + runs[i].num_bytes
        arrays[i] = out[first:end].view(runs[i].dtype.newbyteorder("<"))
    return arrays


def _stretches(runs: Sequence[ChunkRun], most: int) -> list[list[ChunkRun]]:
    """The runs in order, so many decoded bytes at a time but at least a chunk."""
    stretches: list[list[ChunkRun]] = []
    room = 0
    for run in runs:
        size = run.chunk_bytes
        chunk, end = run.first, run.first + run.count
        while chunk < end:
            if not stretches or room < size:
                stretches.append([])
                room = max(most, size)
            count = min(end - chunk, room // size)
            stretches[-1].append(replace(run, first=chunk, count=count))
            chunk, room = chunk + count, room - count * size
    return stretches


def _filled(out: NDArray[Any], runs: Sequence[ChunkRun], *, raw: bool) -> bool:
    """Fill the array with the chunks' bytes; False where one is not what it must be."""
    entries = [run.entries for run in runs]
    bodies = np.array([size - CRC_BYTES for e in entries for _, size in e], np.int64)
    wanted = np.repeat([run.chunk_bytes for run in runs], [run.count for run in runs])
    # zstd makes what it cannot compress longer by a 256th at most.
    most = wanted if raw else wanted + wanted // 256 + 128
    if (bodies <= 0).any() or (bodies > most).any() or (raw and (bodies != wanted).any()):
        return False
    encoded = out if raw else _room_for(int(bodies.sum()))
    checksums = np.empty(len(bodies), "<u4")
    body_view, checksum_view = memoryview(encoded.data), memoryview(checksums.data).cast("B")
    place, number = 0, 0
    try:
        for run, ranges in zip(runs, entries, strict=True):
            places = []
            for _, size in ranges:
                end = place + size - CRC_BYTES
                check = checksum_view[CRC_BYTES * number : CRC_BYTES * (number + 1)]
                places.append((body_view[place:end], check))
                place, number = end, number + 1
            if not run.shard.storage.read_into(run.shard.key, ranges, places):
                return False
    except FileNotFoundError:
        return False
    if not _are_those_written(body_view, checksums, bodies, runs):
        return False
    if raw:
        return True
    if not _frames_hold(body_view, bodies, wanted):
        return False
    try:
        zstd_decompress(encoded, out)
    except (RuntimeError, ValueError):
        return False
    return True


def _are_those_written(
    encoded: memoryview,
    checksums: NDArray[np.uint32],
    sizes: NDArray[np.int64],
    runs: Sequence[ChunkRun],
) -> bool:
    """Whether the chunks are whole, and those of this very place."""
    # numba takes half a second to import.
    from mfdetr_cache.cache.checksum_numba import checksum_of_joined

    if (checksums != np.concatenate([run.checksums for run in runs])).any():
        return False
    return bool(crc32c(encoded) == checksum_of_joined(checksums.astype(np.uint32), sizes))


def _frames_hold(encoded: memoryview, sizes: NDArray[Any], wanted: NDArray[Any]) -> bool:
    """Whether every frame says that it holds a whole chunk: zstd would leave the rest as it was."""
    starts = (np.cumsum(sizes) - sizes).tolist()
    pairs = zip(starts, wanted.tolist(), strict=True)
    return all(frame_bytes(encoded, start) == size for start, size in pairs)


def _fill_again(out: NDArray[Any], runs: Sequence[ChunkRun], *, raw: bool) -> None:
    """The same run by run: bytes may be damaged on their way, or a copy in a mirror may be."""
    end, was_told = 0, False
    for run in runs:
        first, end = end, end + run.num_bytes
        place, shard = out[first:end], run.shard
        if _filled(place, [run], raw=raw):
            continue
        if shard.storage.forget(shard.key):
            was_told = True
            if _filled(place, [run], raw=raw):
                continue
        _fill_one_by_one(place, [run], raw=raw)
    if not was_told:
        warnings.warn(
            f"{runs[0].shard.storage.name} gave wrong bytes, and the right ones when it was asked "
            "again",
            RuntimeWarning,
            stacklevel=3,
        )


def _room_for(size: int) -> NDArray[np.uint8]:
    """Memory of this thread for encoded bytes, kept: fresh pages would cost as much as reading."""
    kept: NDArray[np.uint8] | None = getattr(_KEPT, "room", None)
    if kept is None or len(kept) < size:
        kept = _KEPT.room = np.empty(size, np.uint8)
    return kept[:size]


def _fill_one_by_one(out: NDArray[Any], runs: Sequence[ChunkRun], *, raw: bool) -> None:
    """The same chunk by chunk, to say which one is damaged."""
    end = 0
    for run in runs:
        where = f"{run.shard.name}, chunk"
        for i, piece in enumerate(run.shard.read(run.first, run.count), run.first):
            values = decode_chunk(piece, run.dtype, run.length, f"{where} {i}", raw=raw)
            if int.from_bytes(piece[-CRC_BYTES:], "little") != run.shard.checksums[i]:
                raise CacheError(f"{where} {i} is another chunk than was written there; {MEND}")
            out[end : end + values.nbytes] = values.view(np.uint8)
            end += values.nbytes
