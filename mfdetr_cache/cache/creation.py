"""A new cache: its metadata and everything known before the detector runs, made in one go."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from crc32c import crc32c
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from mfdetr_cache.cache.manifest import FOUNDATION_KEY
from mfdetr_cache.cache.schema import (
    ATTRIBUTES_KEY,
    FORMAT_NAME,
    FORMAT_VERSION,
    CacheLayout,
    row_arrays,
)
from mfdetr_cache.cache.shards import ZSTD_LEVEL
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.protocol import ROOT_KEY, Storage
from mfdetr_cache.choices import Compression
from mfdetr_cache.coco.augmentation import ViewTransform
from mfdetr_cache.errors import CacheError
from mfdetr_cache.files import is_taken
from mfdetr_cache.identity import Identity, identity_hash
from mfdetr_cache.types import DetectorSpec, GroundTruth

_UPFRONT_CHUNK = 2**16


@dataclass(frozen=True)
class ViewContent:
    """What is known about a view before the detector has run.

    Attributes:
        transforms: How the picture of each row is made.
        ground_truth: The objects of each row, in pixels of that picture.
    """

    transforms: list[ViewTransform]
    ground_truth: list[GroundTruth]


@dataclass(frozen=True)
class CacheContent:
    """Everything that is known about a cache before the detector has run.

    Attributes:
        identity: What decides the content; ``detector`` inside it is the detector's own.
        spec: The detector.
        layout: Rows, parts and tokens.
        image_ids: COCO ids in row order.
        file_names: Names relative to the image folder, in row order.
        original_sizes_hw: Annotated sizes in row order.
        categories: ``{"id", "name"}`` of the dataset's categories.
        label_categories: Category id of each detector label, -1 for none.
        views: Every view by name, in the order of the layout.
    """

    identity: Identity
    spec: DetectorSpec
    layout: CacheLayout
    image_ids: list[int]
    file_names: list[str]
    original_sizes_hw: list[tuple[int, int]]
    categories: list[dict[str, Any]]
    label_categories: tuple[int, ...]
    views: dict[str, ViewContent]


def _codecs(compression: Compression = "zstd") -> dict[str, Any]:
    packed = [ZstdCodec(level=ZSTD_LEVEL)] if compression == "zstd" else []
    return {
        "serializer": BytesCodec(endian="little"),
        "compressors": [*packed, Crc32cCodec()],
        "filters": None,
    }


def create_cache(storage: Storage, content: CacheContent) -> None:
    """Write metadata and everything known beforehand; it appears as a whole.

    Args:
        storage: Where the cache goes: nothing, an empty folder, or what a killed creation left.
        content: What the cache is of.

    Raises:
        CacheError: If the storage holds anything else.
    """
    if storage.folder is not None:
        _create_folder(storage.folder, content)
        return
    with tempfile.TemporaryDirectory() as temporary:
        local = LocalStorage(Path(temporary) / "cache")
        _fill(local, content)
        keys = [k for k in local.sizes("") if k != ROOT_KEY]
        # What a killed creation left is written again; anything else is somebody else's.
        if set(storage.sizes("")) - set(keys):
            raise _not_free(storage)
        # The root's metadata makes it a cache: it goes last.
        for key in [*keys, ROOT_KEY]:
            storage.write(key, [local.read(key)])


def _not_free(storage: Storage) -> CacheError:
    """The refusal of a place that holds something else."""
    return CacheError(
        f"{storage.name} exists and is no cache; nothing was touched, use another --cache"
    )


def _create_folder(path: Path, content: CacheContent) -> None:
    """Fill a folder beside the cache and rename it; of several processes, the first one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network disk may know no locks
            fcntl.flock(parent, fcntl.LOCK_EX)
        if (path / ROOT_KEY).is_file():
            return
        partial = path.with_name(path.name + ".creating")
        if is_taken(path):
            raise _not_free(LocalStorage(path))
        if path.is_dir():
            path.rmdir()
        try:
            _fill(LocalStorage(partial), content)
            partial.rename(path)
        except OSError:
            # On a full disk it would keep the room that somebody makes.
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(parent)


def _fill(storage: LocalStorage, content: CacheContent) -> None:
    folder = storage.folder
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    root = zarr.create_group(store=str(folder), overwrite=True)
    root.attrs[ATTRIBUTES_KEY] = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "cache_id": identity_hash(content.identity),
        "identity": content.identity,
        "layout": content.layout.to_dict(),
        "categories": content.categories,
        "label_categories": list(content.label_categories),
    }
    _write_images(root, content)
    for view, known in content.views.items():
        _write_transforms(root, view, known.transforms)
        _write_ground_truth(root, view, known.ground_truth)
        for spec in row_arrays(content.spec, content.layout, view).values():
            array = root.create_array(
                spec.path,
                shape=spec.shape,
                dtype=spec.dtype,
                chunks=spec.chunk,
                shards=spec.shard,
                dimension_names=spec.dimension_names,
                fill_value=0,
                **_codecs(content.layout.compression),
            )
            array.attrs.update(spec.attributes)
    files: dict[str, dict[str, int]] = {}
    for key in storage.sizes(""):
        with (folder / key).open("rb") as opened:
            data = opened.read()
            os.fsync(opened.fileno())
        files[key] = {"bytes": len(data), "crc32c": crc32c(data)}
    text = json.dumps({"files": files}, indent=1, sort_keys=True)
    storage.write(FOUNDATION_KEY, [text.encode()])


def _upfront(root: zarr.Group, name: str, values: NDArray[Any], dims: Iterable[str]) -> None:
    chunk = (max(1, min(len(values), _UPFRONT_CHUNK)), *values.shape[1:])
    array = root.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunk,
        dimension_names=tuple(dims),
        fill_value=0,
        config={"write_empty_chunks": True},
        **_codecs(),
    )
    if len(values):
        array[...] = values


def _write_images(root: zarr.Group, content: CacheContent) -> None:
    encoded = [name.encode() for name in content.file_names]
    offsets = np.cumsum([0, *(len(e) for e in encoded)], dtype=np.int64)
    names = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    sizes = np.array(content.original_sizes_hw, dtype=np.int32).reshape(-1, 2)
    _upfront(root, "images/image_id", np.array(content.image_ids, dtype=np.int64), ["row"])
    _upfront(root, "images/original_hw", sizes, ["row", "hw"])
    _upfront(root, "images/file_name_utf8", names, ["byte"])
    _upfront(root, "images/file_name_offset", offsets, ["row_bound"])


def _write_transforms(root: zarr.Group, view: str, transforms: list[ViewTransform]) -> None:
    base = f"views/{view}/transform"
    crops = np.array([t.crop_xyxy for t in transforms], dtype=np.int32).reshape(-1, 4)
    flips = np.array([t.flip for t in transforms], dtype=np.uint8)
    edges = np.array([t.shortest_edge for t in transforms], dtype=np.int32)
    _upfront(root, f"{base}/crop_xyxy", crops, ["row", "xyxy"])
    _upfront(root, f"{base}/flip", flips, ["row"])
    _upfront(root, f"{base}/shortest_edge", edges, ["row"])


def _write_ground_truth(root: zarr.Group, view: str, per_row: list[GroundTruth]) -> None:
    base = f"views/{view}/ground_truth"

    def column(name: str, dtype: str, tail: tuple[int, ...] = ()) -> NDArray[Any]:
        parts = [getattr(g, name) for g in per_row if len(g)]
        return np.concatenate(parts).astype(dtype) if parts else np.zeros((0, *tail), dtype)

    runs = [r for g in per_row for r in g.run_lengths]
    objects = np.cumsum([0, *(len(g) for g in per_row)], dtype=np.int64)
    run_offsets = np.cumsum([0, *(len(r) for r in runs)], dtype=np.int64)
    flat = np.concatenate(runs) if runs else np.zeros(0, dtype=np.uint32)
    _upfront(root, f"{base}/offset", objects, ["row_bound"])
    _upfront(root, f"{base}/annotation_id", column("annotation_ids", "int64"), ["object"])
    _upfront(root, f"{base}/category_id", column("category_ids", "int64"), ["object"])
    _upfront(root, f"{base}/label", column("labels", "int64"), ["object"])
    _upfront(root, f"{base}/box_xyxy", column("boxes_xyxy", "float32", (4,)), ["object", "xyxy"])
    _upfront(root, f"{base}/area", column("areas", "float64"), ["object"])
    _upfront(root, f"{base}/is_crowd", column("is_crowd", "uint8"), ["object"])
    _upfront(root, f"{base}/run_length_offset", run_offsets, ["object_bound"])
    _upfront(root, f"{base}/run_length", flat.astype(np.uint32), ["run"])
