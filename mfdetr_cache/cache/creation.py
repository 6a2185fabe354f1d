"""A new cache: its metadata and everything known before the detector runs, made in one go."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from mfdetr_cache.cache.annotations import AnnotationContent, write_annotations
from mfdetr_cache.cache.foundation import ANNOTATIONS, seal_foundation
from mfdetr_cache.cache.records import ColumnRecord, FileRecord
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import ATTRIBUTES_KEY
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.protocol import ROOT_KEY, Storage
from mfdetr_cache.cache.zarr_nodes import create_array, write_column
from mfdetr_cache.coco.augmentation import ViewTransform
from mfdetr_cache.coco.image_list import ImageEntry
from mfdetr_cache.errors import CacheError
from mfdetr_cache.files import PARTIAL

# What creation makes at the top of a cache.
_AT_THE_TOP = {ROOT_KEY, "images", "views", ANNOTATIONS}


@dataclass(frozen=True)
class CacheContent:
    """Everything that is known about a cache before the detector has run.

    Attributes:
        root: What decides its content, and its layout.
        images: In row order.
        transforms: How the picture of each row is made, by view.
        labels: The first version of its annotations.
    """

    root: Root
    images: Sequence[ImageEntry]
    transforms: dict[str, list[ViewTransform]]
    labels: AnnotationContent


def create_cache(storage: Storage, content: CacheContent) -> None:
    """Write metadata and everything known beforehand; it appears as a whole.

    The storage holds nothing, an empty folder, or what a killed creation left; else CacheError.
    """
    if storage.folder is not None:
        _create_folder(storage.folder, content)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
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
    # A link stands for a place on another disk; no folder can be put in the place of the link.
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network disk may know no locks
            fcntl.flock(parent, fcntl.LOCK_EX)
        if (path / ROOT_KEY).is_file():
            return
        if path.name in ("", ".."):
            raise CacheError(f"{path} is no new folder, which a cache becomes; name one: --cache")
        partial = path.with_name(path.name + PARTIAL)
        if (path.exists() and not path.is_dir()) or (path.is_dir() and any(path.iterdir())):
            raise _not_free(LocalStorage(path))
        if _is_foreign(partial):
            raise _not_free(LocalStorage(partial))
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


def _is_foreign(partial: Path) -> bool:
    """Whether this is anything but what a killed creation left: it is written over."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        return True
    if not partial.is_dir():
        return False
    return not {f.name for f in partial.iterdir() if f.suffix != PARTIAL} <= _AT_THE_TOP


def _fill(storage: LocalStorage, content: CacheContent) -> None:
    folder, root = storage.folder, content.root
    folder.mkdir(parents=True, exist_ok=True)
    # In one order, whether the layout was planned or read.
    attributes = json.loads(json.dumps(root.attributes, sort_keys=True))
    group = zarr.create_group(
        store=str(folder), overwrite=True, attributes={ATTRIBUTES_KEY: attributes}
    )
    for view in content.transforms:
        for spec in root.arrays[view].values():
            create_array(group, spec, root.layout.compression)
    columns = _columns(content)
    for path, values in columns.items():
        write_column(group, path, root.column(path), values)
    group.create_group(ANNOTATIONS)
    files = {key: _synced(folder / key) for key in storage.sizes("")}
    lengths = {path: len(values) for path, values in columns.items()}
    seal_foundation(storage, root, ColumnRecord(lengths, files))
    write_annotations(storage, root, 0, content.labels)


def _synced(path: Path) -> FileRecord:
    with path.open("rb") as opened:
        data = opened.read()
        os.fsync(opened.fileno())
    return FileRecord.of(data)


def _columns(content: CacheContent) -> dict[str, NDArray[Any]]:
    """The columns that are written at creation, by path."""
    encoded = [entry.file_name.encode() for entry in content.images]
    sizes_hw = [entry.size_hw for entry in content.images]
    columns: dict[str, NDArray[Any]] = {
        "images/image_id": np.array([e.image_id for e in content.images], dtype=np.int64),
        "images/original_hw": np.array(sizes_hw, dtype=np.int32).reshape(-1, 2),
        "images/file_name_utf8": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "images/file_name_offset": np.cumsum([0, *(len(e) for e in encoded)], dtype=np.int64),
    }
    for view, transforms in content.transforms.items():
        base = f"views/{view}/transform"
        crops = np.array([t.crop_xyxy for t in transforms], dtype=np.int32)
        edges = np.array([t.shortest_edge for t in transforms], dtype=np.int32)
        columns[f"{base}/crop_xyxy"] = crops.reshape(-1, 4)
        columns[f"{base}/flip"] = np.array([t.flip for t in transforms], dtype=np.uint8)
        columns[f"{base}/shortest_edge"] = edges
    return columns
