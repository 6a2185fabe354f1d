"""One image as it will stand in a cache: quantised, cut into chunks, compressed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import BASE_VIEW, C1_ROI, ROW_OK, stored_maps
from mfdetr_cache.cache.shards import encode_chunk
from mfdetr_cache.errors import CacheError
from mfdetr_cache.ops.quantisation import ENCODINGS, StoredMap, encode_map
from mfdetr_cache.types import C1Crops, DetectorOutput, ImageGeometry

if TYPE_CHECKING:
    from mfdetr_cache.ops.quantisation_torch import EncodedMaps


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image as it will stand in the shards: values of the small arrays, encoded chunks."""

    tables: dict[str, Any]
    chunks: dict[str, list[bytes]]

    @property
    def num_bytes(self) -> int:
        """Compressed bytes."""
        return sum(len(c) for chunks in self.chunks.values() for c in chunks)


class ImageEncoder:
    """Encodes images of a cache; from any number of threads."""

    def __init__(self, root: Root) -> None:
        self._spec, self._layout = root.spec, root.layout
        self._encoding = ENCODINGS[root.layout.preset]
        self._raw = root.layout.compression == "raw"
        # Chunks are the same in every view.
        self._specs = root.arrays[BASE_VIEW]

    def encode(
        self,
        row: int,
        geometry: ImageGeometry,
        output: DetectorOutput,
        crops: C1Crops | None = None,
        maps: "Mapping[str, EncodedMaps] | None" = None,
    ) -> EncodedImage:
        """Quantise and compress the output for one image, a batch of one on the CPU.

        With ``crops`` of C1 where the layout keeps these in place of the map, and ``maps`` in place
        of the output's where a GPU quantised them. ValueError if an array has another shape than
        declared, CacheError if a value is not finite, in the detector or after rounding to float16.
        """
        image = EncodedImage({}, {})
        image.tables["status"] = ROW_OK
        image.tables["resized_hw"] = geometry.resized_hw
        image.tables["input_hw"] = geometry.input_hw
        for name in ("class_logits", "boxes_cxcywh_norm", "queries"):
            self._encode_row(image, name, getattr(output, name)[0].numpy(), row)
        for spec in stored_maps(self._spec, self._layout):
            name = spec.name
            if spec.role == "c1_roi":
                continue
            if maps is None:
                stored = self._quantised(name, output.maps[name][0].numpy(), row)
            else:
                largest = float(maps[name].largest)
                if not largest <= self._encoding.largest:  # nor NaN
                    raise _not_finite(largest, row, f"map {name}", np.dtype(np.float16))
                stored = maps[name].stored()
            self._add_map(image, name, stored, row)
        if self._layout.c1_roi is not None:
            if crops is None:
                raise ValueError(f"row {row} has no crops of C1, which the layout asks for")
            self._encode_crops(image, crops, row)
        return image

    def _encode_row(self, image: EncodedImage, name: str, values: NDArray[Any], row: int) -> None:
        """An array that has one chunk an image."""
        spec = self._specs[name]
        if values.shape != spec.shape[1:]:
            raise ValueError(f"{name} of row {row} is {values.shape}, declared {spec.shape[1:]}")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values[None], dtype=spec.dtype)
        if not np.isfinite(stored).all():
            raise _not_finite(float(np.nanmax(np.abs(values))), row, name, stored.dtype)
        image.chunks[name] = [self._encode_chunk(name, stored)]

    def _encode_chunk(self, name: str, values: NDArray[np.generic]) -> bytes:
        """One chunk, filled up with zeros to its full size."""
        chunk = self._specs[name].chunk
        if values.shape != chunk:
            padded = np.zeros(chunk, dtype=values.dtype)
            padded[: len(values)] = values
            values = padded
        return encode_chunk(values, raw=self._raw)

    def _encode_crops(self, image: EncodedImage, crops: C1Crops, row: int) -> None:
        most = self._specs[f"{C1_ROI}/query_index"].shape[1]
        queries = np.full(most, -1, dtype=np.int32)
        queries[: len(crops.query_index)] = crops.query_index
        image.tables[f"{C1_ROI}/c1_hw"] = crops.c1_hw
        self._encode_row(image, f"{C1_ROI}/query_index", queries, row)
        self._encode_row(image, f"{C1_ROI}/moments", crops.moments, row)
        values = np.asarray(crops.crops.to_array(), dtype=np.float32).transpose(2, 0, 1)
        self._add_map(image, C1_ROI, self._quantised(C1_ROI, values, row), row)

    def _quantised(self, name: str, values: NDArray[Any], row: int) -> StoredMap:
        """A (C, h, w) map in the layout's encoding."""
        channels, height, width = values.shape
        planes = np.ascontiguousarray(values, dtype=np.float32).reshape(channels, height * width)
        try:
            encoded = encode_map(planes.T, self._encoding)
        except CacheError:
            largest = float(np.nanmax(np.abs(values)))
            raise _not_finite(largest, row, f"map {name}", np.dtype(np.float16)) from None
        return StoredMap((height, width), channels, self._encoding, *encoded)

    def _add_map(self, image: EncodedImage, name: str, stored: StoredMap, row: int) -> None:
        """Cut a map into chunks of tokens; the last chunk is padded with zeros."""
        base = f"maps/{name}"
        spec = self._specs[f"{base}/values"]
        if stored.channels != spec.attributes["channels"]:
            raise ValueError(
                f"map {name} of row {row} has {stored.channels} channels, "
                f"not {spec.attributes['channels']}"
            )
        values, affine = stored.values, stored.affine
        step = spec.chunk[0]
        starts = range(0, len(values), step)
        image.tables[f"{base}/hw"] = stored.hw
        image.chunks[f"{base}/values"] = [
            self._encode_chunk(f"{base}/values", values[i : i + step]) for i in starts
        ]
        if affine is not None:
            # Of every chunk; where a map has one scale, of the image.
            block = self._encoding.block_tokens
            pieces = (
                [affine[i // block : (i + step) // block] for i in starts] if block else [affine]
            )
            image.chunks[f"{base}/affine"] = [
                self._encode_chunk(f"{base}/affine", p) for p in pieces
            ]


def _not_finite(largest: float, row: int, name: str, dtype: np.dtype[np.generic]) -> CacheError:
    return CacheError(
        f"{name} of row {row} is not finite as {dtype} (largest value {largest:.3g}); "
        "the detector or its input is broken"
    )
