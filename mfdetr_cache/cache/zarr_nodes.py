"""Groups and arrays as zarr-python writes them: their metadata, and the columns written at once."""

from typing import Any

import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from mfdetr_cache.cache.arrays import ArraySpec, ColumnSpec
from mfdetr_cache.cache.shards import ZSTD_LEVEL
from mfdetr_cache.choices import Compression


def create_array(root: zarr.Group, spec: ArraySpec, compression: Compression) -> None:
    """The metadata of an array that is written part by part."""
    root.create_array(
        spec.path,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.chunk,
        shards=spec.shard,
        dimension_names=spec.dimension_names,
        attributes=spec.attributes,
        fill_value=0,
        **_codecs(compression),
    )


def write_column(root: zarr.Group, path: str, spec: ColumnSpec, values: NDArray[Any]) -> None:
    """An array that is written at once."""
    array = root.create_array(
        path,
        shape=(len(values), *spec.tail),
        dtype=spec.dtype,
        chunks=(max(1, min(len(values), spec.chunk)), *spec.tail),
        dimension_names=spec.dimension_names,
        fill_value=0,
        config={"write_empty_chunks": True},
        **_codecs("zstd"),
    )
    if len(values):
        array[...] = values.astype(spec.dtype, copy=False)


def _codecs(compression: Compression) -> dict[str, Any]:
    packed = [ZstdCodec(level=ZSTD_LEVEL)] if compression == "zstd" else []
    return {
        "serializer": BytesCodec(endian="little"),
        "compressors": [*packed, Crc32cCodec()],
        "filters": None,
    }
