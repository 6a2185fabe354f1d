"""Chunks of several files that are read, checked and decoded together."""

from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from mfdetr_cache.cache import chunks
from mfdetr_cache.cache.checksum_numba import checksum_of_joined
from mfdetr_cache.cache.chunks import ChunkRun, read_chunks
from mfdetr_cache.cache.shards import ShardBuilder, ShardReader, encode_chunk
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.object_store import ObjectStorage
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import CacheError


@given(st.lists(st.binary(max_size=70_000), max_size=6))
def test_the_checksum_of_stretches_is_that_of_their_bytes(pieces: list[bytes]) -> None:
    checksums = np.array([crc32c(p) for p in pieces], np.uint32)
    sizes = np.array([len(p) for p in pieces], np.int64)
    assert checksum_of_joined(checksums, sizes) == crc32c(b"".join(pieces))


def write(storage: Storage, key: str, values: np.ndarray, *, raw: bool) -> None:
    builder = ShardBuilder(len(values))
    for number, row in enumerate(values):
        builder.add(number, encode_chunk(row, raw=raw))
    pieces, record = builder.finish()
    storage.write(key, pieces)
    # What a manifest keeps.
    storage.write(f"{key}.index", [record.index_sha256.encode()])


def runs_of(storage: Storage, arrays: dict[str, np.ndarray]) -> list[ChunkRun]:
    """All chunks but the first of each."""
    return [
        ChunkRun(opened(storage, k, len(v)), 1, len(v) - 1, v.shape[1], v.dtype)
        for k, v in arrays.items()
    ]


def opened(storage: Storage, key: str, num_chunks: int) -> ShardReader:
    index_sha256 = bytes.fromhex(storage.read(f"{key}.index").decode())
    return ShardReader.open(storage, key, num_chunks, index_sha256)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Bytes before wider types, and an odd number of them."""
    random = np.random.default_rng(0)
    return {
        "codes": random.integers(0, 9, (4, 333)).astype(np.uint8),
        "affine": random.random((3, 20)).astype(np.float16),
        "logits": random.random((2, 7)).astype(np.float32),
    }


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("place", ["folder", "objects"])
def test_arrays_come_back(
    tmp_path: Path, arrays: dict[str, np.ndarray], place: str, *, raw: bool, pinned: bool
) -> None:
    """Also where there is no memory to pin, as without a GPU."""
    storage: Storage = LocalStorage(tmp_path)
    if place == "objects":
        storage = ObjectStorage(f"memory://{tmp_path}")
    for key, values in arrays.items():
        write(storage, key, values, raw=raw)
    found = read_chunks(runs_of(storage, arrays), raw=raw, pinned=pinned)
    for values, wanted in zip(found, arrays.values(), strict=True):
        assert values.dtype == wanted.dtype
        assert values.flags.aligned
        np.testing.assert_array_equal(values, wanted[1:].ravel())
    assert read_chunks([], raw=raw) == []


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("at_a_time", [1, 333, 700, 1000])
def test_stretches_of_any_length_give_the_same(
    tmp_path: Path,
    arrays: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    at_a_time: int,
    *,
    raw: bool,
) -> None:
    monkeypatch.setattr(chunks, "_IN_CACHE", at_a_time)
    storage = LocalStorage(tmp_path)
    for key, values in arrays.items():
        write(storage, key, values, raw=raw)
    found = read_chunks(runs_of(storage, arrays), raw=raw)
    for values, wanted in zip(found, arrays.values(), strict=True):
        np.testing.assert_array_equal(values, wanted[1:].ravel())


@pytest.mark.parametrize("raw", [False, True])
def test_every_flipped_byte_is_noticed_and_placed(tmp_path: Path, *, raw: bool) -> None:
    storage = LocalStorage(tmp_path)
    arrays = {
        "a": np.arange(40, dtype=np.uint8).reshape(4, 10),
        "b": np.arange(12, dtype=np.float16).reshape(3, 4),
    }
    for key, values in arrays.items():
        write(storage, key, values, raw=raw)
    runs = runs_of(storage, arrays)
    for run in runs:
        path = tmp_path / run.shard.key
        whole = path.read_bytes()
        for number in range(run.first, run.first + run.count):
            offset, size = run.shard.entries(number, 1)[0]
            for position in range(offset, offset + size):
                broken = bytearray(whole)
                broken[position] ^= 0x10
                path.write_bytes(broken)
                expected = f"{run.shard.key}, chunk {number} has a wrong checksum"
                with pytest.raises(CacheError, match=expected):
                    read_chunks(runs, raw=raw)
        path.write_bytes(whole)
    read_chunks(runs, raw=raw)


def test_what_is_cut_off_or_gone_is_named(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    storage = LocalStorage(tmp_path)
    for key, values in arrays.items():
        write(storage, key, values, raw=False)
    runs = runs_of(storage, arrays)
    path = tmp_path / "codes"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CacheError, match="codes is cut off"):
        read_chunks(runs)
    path.unlink()
    with pytest.raises(CacheError, match="codes is missing from the cache"):
        read_chunks(runs)


def test_a_file_is_read_by_one_call(
    tmp_path: Path, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the threads beside a GPU depend on."""
    storage = LocalStorage(tmp_path)
    for key, values in arrays.items():
        write(storage, key, values, raw=False)
    runs = runs_of(storage, arrays)
    calls: list[str] = []
    for module, name in (("os", "preadv"), ("os", "pread")):
        real = getattr(__import__(module), name)
        monkeypatch.setattr(
            f"{module}.{name}",
            lambda *a, real=real, name=name: (calls.append(name), real(*a))[1],
        )
    for name in ("crc32c", "zstd_decompress"):
        real = getattr(chunks, name)
        monkeypatch.setattr(
            chunks, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1]
        )
    read_chunks(runs)
    assert sorted(calls) == ["crc32c", *["preadv"] * 3, "zstd_decompress"]
