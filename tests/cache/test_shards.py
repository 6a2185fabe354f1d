import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
import zarr
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from mfdetr_cache.cache.chunks import ChunkRun, read_chunks
from mfdetr_cache.cache.shards import ShardBuilder, ShardReader, decode_chunk, encode_chunk
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.errors import CacheError


def write_array(folder: Path, values: np.ndarray, chunk: int, leave_out: set[int]) -> Path:
    zarr.create_array(
        str(folder),
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, values.shape[1]),
        shards=values.shape,
        serializer=BytesCodec(endian="little"),
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        filters=None,
        fill_value=0,
    )
    builder = ShardBuilder(len(values) // chunk)
    for index in range(len(values) // chunk):
        if index not in leave_out:
            builder.add(index, encode_chunk(values[index * chunk : (index + 1) * chunk]))
    pieces, record = builder.finish()
    LocalStorage(folder).write("c/0/0", pieces)
    # What a manifest keeps.
    (folder / "index_sha256").write_text(record.index_sha256)
    return folder / "c/0/0"


def opened(path: Path, num_chunks: int) -> ShardReader:
    index_sha256 = bytes.fromhex((path.parents[2] / "index_sha256").read_text())
    return ShardReader.open(LocalStorage(path.parent), path.name, num_chunks, index_sha256)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "uint8"])
def test_zarr_reads_our_shards(tmp_path: Path, dtype: str) -> None:
    values = (np.random.default_rng(0).random((24, 5)) * 100).astype(dtype)
    write_array(tmp_path / "a", values, 4, set())
    array = zarr.open_array(str(tmp_path / "a"), mode="r")
    assert (np.asarray(array[...]) == values).all()


def test_our_chunks_are_zarrs_chunks(tmp_path: Path) -> None:
    """Decoded from a shard that zarr wrote, found by its index."""
    values = np.random.default_rng(0).random((24, 5)).astype(np.float16)
    path = write_array(tmp_path / "a", np.zeros_like(values), 4, set())
    array = zarr.open_array(str(tmp_path / "a"), mode="r+")
    array[...] = values
    data = path.read_bytes()
    index = np.frombuffer(data[-4 - 6 * 16 : -4], "<u8").reshape(6, 2).tolist()
    pieces = [data[offset : offset + size] for offset, size in index[2:5]]
    found = np.concatenate([decode_chunk(p, values.dtype, 20, "x") for p in pieces])
    assert (found.reshape(12, 5) == values[8:20]).all()


def test_a_missing_chunk_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    values = np.ones((24, 5), dtype=np.float16)
    path = write_array(tmp_path / "a", values, 4, {3})
    # The behaviour this guards against:
    assert (np.asarray(zarr.open_array(str(tmp_path / "a"), mode="r")[12:16]) == 0).all()
    with pytest.raises(CacheError, match="chunk 3 is missing"):
        list(opened(path, 6).read(3, 1))


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((8, 5)).astype(np.float16)
    path = write_array(tmp_path / "a", values, 4, set())
    whole = path.read_bytes()

    def read_all() -> np.ndarray:
        pieces = list(opened(path, 2).read(0, 2))
        return np.concatenate([decode_chunk(p, values.dtype, 20, "x") for p in pieces])

    assert (read_all() == values.ravel()).all()
    for position in range(len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 0x10
        path.write_bytes(broken)
        with pytest.raises(CacheError, match=r"checksum|damaged index"):
            read_all()


@pytest.mark.parametrize("keep", [0, 10, 30, -1, -5])
def test_torn_files_are_noticed(tmp_path: Path, keep: int) -> None:
    values = np.random.default_rng(0).random((8, 5)).astype(np.float16)
    path = write_array(tmp_path / "a", values, 4, set())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheError, match=r"cut off|damaged index"):
        list(opened(path, 2).read(0, 2))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="absent is missing from the cache"):
        ShardReader.open(LocalStorage(tmp_path), "absent", 2, b"")


def test_an_intact_shard_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    """Without zstd, the indexes of two shards of an array are the same."""
    random = np.random.default_rng(0)
    paths = [
        write_array(tmp_path / name, random.random((24, 5)).astype(np.float16), 4, set())
        for name in "ab"
    ]
    right, wrong = (p.read_bytes() for p in paths)
    paths[0].write_bytes(wrong)
    with pytest.raises(CacheError, match="has a damaged index or is another file"):
        opened(paths[0], 6)
    # The first chunks of the one before the last of the other, as an rsync leaves it.
    index = np.frombuffer(right[-4 - 6 * 16 : -4], "<u8").reshape(6, 2)
    cut = int(index[2, 0])
    if cut == int(np.frombuffer(wrong[-4 - 6 * 16 : -4], "<u8").reshape(6, 2)[2, 0]):
        paths[0].write_bytes(wrong[:cut] + right[cut:])
        with pytest.raises(CacheError, match="is another chunk than was written there"):
            read_chunks([ChunkRun(opened(paths[0], 6), 0, 3, 20, np.dtype(np.float16))])


@pytest.mark.parametrize("claimed", [0, 39, 41, 10**11, 2**63])
def test_a_frame_that_claims_another_size_takes_no_memory(claimed: int) -> None:
    values = np.arange(20, dtype=np.float16)
    frame = bytearray(encode_chunk(values)[:-4])
    # Header with a size of eight bytes, as the format allows for any content.
    body = frame[6:]
    forged = bytes(frame[:4]) + bytes([0b11100000]) + claimed.to_bytes(8, "little") + bytes(body)
    with pytest.raises(CacheError, match=f"holds {claimed} bytes instead of 40"):
        decode_chunk(forged + struct.pack("<I", crc32c(forged)), values.dtype, 20, "x")


@given(st.binary(max_size=60))
def test_any_bytes_with_a_right_checksum_are_refused_or_right(data: bytes) -> None:
    chunk = data + struct.pack("<I", crc32c(data))
    with contextlib.suppress(CacheError):
        assert decode_chunk(chunk, np.dtype(np.uint8), 10, "x").nbytes == 10
