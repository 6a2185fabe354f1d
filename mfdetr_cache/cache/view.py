"""One view of a cache: what one pass of the detector over the dataset left."""

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.cache.annotations import Annotations
from mfdetr_cache.cache.chunks import ChunkRun, read_chunks
from mfdetr_cache.cache.columns import read_checked
from mfdetr_cache.cache.foundation import Foundation
from mfdetr_cache.cache.schema import C1_ROI, ROW_OK, ROW_SKIPPED, Part, stored_maps
from mfdetr_cache.cache.shards import ShardReader, decode_chunk
from mfdetr_cache.coco.augmentation import ViewTransform
from mfdetr_cache.errors import MEND, CacheError
from mfdetr_cache.ops.quantisation import ENCODINGS, StoredMap
from mfdetr_cache.types import C1Crops, CachedImage, GroundTruth, ImageGeometry

_ROW_ARRAYS = ("class_logits", "boxes_cxcywh_norm", "queries")


class CacheView:
    """One pass of the detector, by row; ``arrays`` by their name below the view."""

    def __init__(self, cache: Foundation, name: str, annotations: Annotations) -> None:
        self.name = name
        self.arrays = cache.root.arrays[name]
        self._cache = cache
        self._annotations = annotations
        self._positions = {array: i for i, array in enumerate(self.arrays)}
        self._tables: dict[str, NDArray[Any]] = {}
        self._chunk_types = {
            name: (math.prod(spec.chunk), np.dtype(spec.dtype))
            for name, spec in self.arrays.items()
        }
        self._encoding = ENCODINGS[cache.layout.preset]
        self._raw = cache.layout.compression == "raw"
        # Bounded by the number of parts and arrays: an index is 16 bytes a chunk.
        self._shards: dict[tuple[str, int], ShardReader] = {}

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """Rows with content, in order; skipped images are not among them."""
        return tuple(int(r) for r in np.flatnonzero(self._table("status") == ROW_OK))

    def transform(self, row: int) -> ViewTransform:
        """How the picture of a row was made from the original."""
        base, columns = f"views/{self.name}/transform", self._cache.columns
        x0, y0, x1, y1 = columns[f"{base}/crop_xyxy"][row].tolist()
        flip, edge = columns[f"{base}/flip"][row], columns[f"{base}/shortest_edge"][row]
        return ViewTransform((x0, y0, x1, y1), bool(flip), int(edge))

    def geometry(self, row: int) -> ImageGeometry:
        """Sizes of a row's picture in this view: in original pixels, resized, and of the input."""
        original_hw = self.transform(row).size_hw
        return ImageGeometry(original_hw, self._hw("resized_hw", row), self._hw("input_hw", row))

    def map_bytes(self, row: int) -> int:
        """Bytes of a row's maps as float16, before quantisation and compression."""
        total = 0
        for m in stored_maps(self._cache.spec, self._cache.layout):
            height, width = self._hw(f"maps/{m.name}/hw", row)
            total += height * width * m.channels * 2
        return total

    def ground_truth(self, row: int) -> GroundTruth:
        """The annotated objects of a row in pixels of the view's picture, masks as run lengths."""
        return self._annotations.objects(self.name, row, self.transform(row).size_hw)

    def read(
        self, row: int, map_names: tuple[str, ...] | None = None, *, pinned: bool = False
    ) -> CachedImage:
        """What :meth:`FeatureCache.read` gives for this view."""
        cache = self._cache
        if self._table("status")[row] != ROW_OK:
            raise CacheError(f"{cache.path}: row {row} has no content (skipped or not extracted)")
        if map_names is None:
            map_names = tuple(m.name for m in stored_maps(cache.spec, cache.layout))
        c1 = next((m.name for m in cache.spec.maps if m.role == "c1"), "")
        if c1 in map_names and cache.layout.c1 == "none":
            raise CacheError(f"{cache.path} was extracted with --c1 none: it has no {c1}")
        with_crops = cache.layout.c1_roi is not None and bool({c1, C1_ROI} & set(map_names))
        names = [n for n in map_names if not with_crops or n not in (c1, C1_ROI)]
        newer = self._annotations.crops(self.name, row) if with_crops else None
        rows = [*_ROW_ARRAYS, f"{C1_ROI}/moments"] if with_crops else _ROW_ARRAYS
        # Apart from the maps: whoever keeps a few numbers of an image must not keep its maps.
        held = self._read_arrays({name: self._run_of_row(name, row) for name in rows})
        runs: dict[str, ChunkRun] = {}
        for name in [*names, C1_ROI] if with_crops and newer is None else names:
            runs |= self._runs_of_map(name, row)
        held |= self._read_arrays(runs, pinned=pinned)
        crops = self._crops(row, held, newer) if with_crops else None
        logits = held["class_logits"][0]
        # Labels may say that the classes are one.
        if cache.spec is not cache.root.spec:
            # It imports torch, for which nobody waits who asks what a cache is.
            import torch

            from mfdetr_cache.ops.any_class import any_class

            score_function = cache.root.spec.score_function
            logits = any_class(torch.from_numpy(logits), score_function).numpy()
        return CachedImage(
            row=row,
            image_id=cache.image_id(row),
            file_name=cache.file_name(row),
            geometry=self.geometry(row),
            class_logits=logits,
            boxes_cxcywh_norm=held["boxes_cxcywh_norm"][0],
            queries=held["queries"][0],
            maps={name: self._stored_map(name, row, held) for name in names},
            ground_truth=self.ground_truth(row),
            view=self.name,
            c1_crops=crops,
        )

    def crop_queries(self, row: int) -> NDArray[np.int64]:
        """Queries, rising, whose crops of C1 the features hold; CacheError if that cannot be."""
        name = f"{C1_ROI}/query_index"
        queries = self._read_arrays({name: self._run_of_row(name, row)})[name][0]
        if (queries >= self._cache.spec.num_queries).any():
            raise CacheError(f"{self._cache.path}: row {row} has crops of unknown queries; {MEND}")
        known: NDArray[np.int64] = queries[queries >= 0].astype(np.int64)
        return known

    def _crops(
        self,
        row: int,
        held: dict[str, NDArray[Any]],
        newer: tuple[NDArray[np.int64], StoredMap] | None,
    ) -> C1Crops:
        """Crops of a row: those of the features, or those that came with newer annotations."""
        if newer is None:
            newer = (self.crop_queries(row), self._stored_map(C1_ROI, row, held))
        return C1Crops(*newer, held[f"{C1_ROI}/moments"][0], self._hw(f"{C1_ROI}/c1_hw", row))

    def largest_maps(self, map_names: tuple[str, ...]) -> int:
        """Most bytes that :meth:`read` needs for the maps of a row."""
        total = np.zeros(self._cache.layout.num_rows, np.int64)
        for m in stored_maps(self._cache.spec, self._cache.layout):
            if m.name not in map_names and m.role != "c1_roi":
                continue
            values, affine = f"maps/{m.name}/values", f"maps/{m.name}/affine"
            cells = self._table(f"maps/{m.name}/hw").prod(axis=1, dtype=np.int64)
            chunks = -(-cells // self.arrays[values].chunk[0])
            total += chunks * self._chunk_bytes(values)
            if self._encoding.block_tokens:
                total += chunks * self._chunk_bytes(affine)
            elif self._encoding.is_affine:
                total += self._chunk_bytes(affine)
        return int(total.max(initial=0))

    def _chunk_bytes(self, name: str) -> int:
        count, dtype = self._chunk_types[name]
        return count * dtype.itemsize

    def chunk_runs(self, row: int) -> tuple[ChunkRun, ...]:
        """What :meth:`read` reads for a row with all its maps, for measuring."""
        runs = {name: self._run_of_row(name, row) for name in _ROW_ARRAYS}
        for m in stored_maps(self._cache.spec, self._cache.layout):
            runs |= self._runs_of_map(m.name, row)
        return tuple(runs.values())

    def _table(self, name: str) -> NDArray[Any]:
        """A column over all rows, read chunk by chunk; rows of missing parts are zero."""
        if name not in self._tables:
            spec, layout = self.arrays[name], self._cache.layout
            full = np.zeros((layout.parts_per_view * spec.chunk[0], *spec.shape[1:]), spec.dtype)
            count, dtype = math.prod(spec.chunk), np.dtype(spec.dtype)
            for number in range(layout.parts_per_view):
                if Part(self.name, number) not in self._cache.sealed:
                    continue
                key = spec.key_of_part(number)
                where = f"{self._cache.path}/{key}"
                data = read_checked(self._cache.storage, key, self._hash(name, number))
                values = decode_chunk(data, dtype, count, where, raw=self._raw)
                place = slice(number * spec.chunk[0], (number + 1) * spec.chunk[0])
                full[place] = values.reshape(spec.chunk)
            table = full[: layout.num_rows]
            if not self._is_possible(name, table):
                raise CacheError(
                    f"{self._cache.path}: {spec.path} holds what no image can have; {MEND}"
                )
            self._tables[name] = table
        return self._tables[name]

    def _hw(self, name: str, row: int) -> tuple[int, int]:
        """Height and width of a row, from a table of these."""
        height, width = self._table(name)[row].tolist()
        return height, width

    def _is_possible(self, name: str, table: NDArray[Any]) -> bool:
        """Whether sizes and places fit the layout, so that nothing outside of it is read."""
        if name == "status":
            return int(table.max(initial=0)) <= ROW_SKIPPED
        if name.endswith("/offset"):
            base = name.removesuffix("offset")
            values = self.arrays[f"{base}values"]
            assert values.shard is not None
            rows = self._table("status") == ROW_OK
            part = np.arange(len(table)) // self._cache.layout.images_per_part
            first = table - part * values.shard[0]
            cells = self._table(f"{base}hw").prod(axis=1, dtype=np.int64)
            fits = (first >= 0) & (first % values.chunk[0] == 0)
            fits &= (cells <= values.shard[0]) & (first <= values.shard[0] - cells)
            return bool(fits[rows].all())
        if name == "resized_hw":
            return bool((table <= self._table("input_hw")).all() and (table >= 0).all())
        return bool((table >= 0).all() and (table < 2**31 - 1).all())

    def _hash(self, name: str, number: int) -> bytes:
        """What the manifest of a part says of an array's file."""
        part = Part(self.name, number)
        if part not in self._cache.sealed:
            raise CacheError(f"{self._cache.path}: {part} is missing; run the same extract again")
        return self._cache.sealed[part][self._positions[name]]

    def _shard(self, name: str, number: int) -> ShardReader:
        key = (name, number)
        if key not in self._shards:
            spec = self.arrays[name]
            self._shards[key] = ShardReader.open(
                self._cache.storage,
                spec.key_of_part(number),
                spec.chunks_per_part,
                self._hash(name, number),
            )
        return self._shards[key]

    def _read_arrays(
        self, runs: dict[str, ChunkRun], *, pinned: bool = False
    ) -> dict[str, NDArray[Any]]:
        """Some arrays' rows, by name."""
        arrays = read_chunks(list(runs.values()), raw=self._raw, pinned=pinned)
        return {
            name: values.reshape(-1, *self.arrays[name].shape[1:])
            for name, values in zip(runs, arrays, strict=True)
        }

    def _run_of_row(self, name: str, row: int) -> ChunkRun:
        part, index = divmod(row, self._cache.layout.images_per_part)
        return ChunkRun(self._shard(name, part), index, 1, *self._chunk_types[name])

    def _runs_of_map(self, name: str, row: int) -> dict[str, ChunkRun]:
        """The chunks of a map, by array; none for a map without cells."""
        values, affine = f"maps/{name}/values", f"maps/{name}/affine"
        part, spec = row // self._cache.layout.images_per_part, self.arrays[values]
        assert spec.shard is not None
        offset = int(self._table(f"maps/{name}/offset")[row]) - part * spec.shard[0]
        height, width = self._hw(f"maps/{name}/hw", row)
        first, count = offset // spec.chunk[0], -(-height * width // spec.chunk[0])
        if not count:
            return {}
        runs = {
            values: ChunkRun(self._shard(values, part), first, count, *self._chunk_types[values])
        }
        if self._encoding.block_tokens:
            shard = self._shard(affine, part)
            runs[affine] = ChunkRun(shard, first, count, *self._chunk_types[affine])
        elif self._encoding.is_affine:
            runs[affine] = self._run_of_row(affine, row)
        return runs

    def _stored_map(self, name: str, row: int, held: dict[str, NDArray[Any]]) -> StoredMap:
        base = f"maps/{name}"
        spec = self.arrays[f"{base}/values"]
        height, width = self._hw(f"{base}/hw", row)
        nothing = np.zeros((0, *spec.shape[1:]), spec.dtype)
        values = held.get(f"{base}/values", nothing)
        affine = None
        if self._encoding.is_affine:
            shape = self.arrays[f"{base}/affine"].shape[1:]
            affine = held.get(f"{base}/affine", np.zeros((0, *shape), np.float16))
            affine = affine[: self._encoding.blocks(height * width)]
        channels = int(spec.attributes["channels"])
        return StoredMap((height, width), channels, self._encoding, values, affine)
