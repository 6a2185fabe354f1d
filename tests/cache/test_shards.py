from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

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
    path = folder / "c/0/0"
    LocalStorage(folder).write("c/0/0", builder.finish())
    return path


def opened(path: Path, num_chunks: int) -> ShardReader:
    return ShardReader.open(LocalStorage(path.parent), path.name, num_chunks)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "uint8"])
def test_zarr_reads_our_shards(tmp_path: Path, dtype: str) -> None:
    values = (np.random.default_rng(0).random((24, 5)) * 100).astype(dtype)
    write_array(tmp_path / "a", values, 4, set())
    array = zarr.open_array(str(tmp_path / "a"), mode="r")
    assert (np.asarray(array[...]) == values).all()


def test_we_read_zarrs_shards(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((24, 5)).astype(np.float16)
    write_array(tmp_path / "a", np.zeros_like(values), 4, set())
    array = zarr.open_array(str(tmp_path / "a"), mode="r+")
    array[...] = values
    reader = opened(tmp_path / "a/c/0/0", 6)
    pieces = list(reader.read(2, 3))
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
        opened(tmp_path / "absent", 2)
