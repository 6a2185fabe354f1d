"""A cache in an object store, with copies of what was read on a local disk."""

import hashlib
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.protocol import ROOT_KEY, Storage, files_below
from mfdetr_cache.errors import CacheError
from mfdetr_cache.files import DISK_FULL

# A process counts what all keep in a mirror whenever it has added so many parts of its size.
_COUNTS = 64


class MirroredStorage(Storage):
    """A storage whose parts are copied to a local folder when they are first read, up to a size.

    What came first stays: training reads every piece once an epoch in a new order, where dropping
    the least recently used piece would drop mostly what is needed next. Copies are kept under the
    checksum of the source's root metadata, which holds the cache's identity: another cache under
    the same URL never meets the copies of the old one. A copy is not synced to disk; one that a
    power cut has torn fails its checksum and is fetched again, see :meth:`forget`. Several
    processes may share the folder, which then holds some hundredths more than ``max_bytes``.
    """

    def __init__(self, source: Storage, mirror: Path, max_bytes: int) -> None:
        self.name, self.annotations = source.name, source.annotations
        self._source = source
        self._mirror = LocalStorage(mirror)
        self._root = mirror
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._folder_of_cache = ""
        self._is_full = False
        mirror.mkdir(parents=True, exist_ok=True)
        self._held = self._count()
        self._added = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return MirroredStorage, (self._source, self._root, self._max_bytes)

    def read(self, key: str) -> bytes:
        # Metadata is small and may be repaired, so it is never mirrored.
        return self._source.read(key)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        folder = self._folder(key)
        names = [f"{folder}/{start}-{size}" for start, size in ranges]
        pieces = [self._copy(name, size) for name, (_, size) in zip(names, ranges, strict=True)]
        absent = [i for i, piece in enumerate(pieces) if piece is None]
        if absent:
            fetched = self._source.read_ranges(key, [ranges[i] for i in absent])
            for i, piece in zip(absent, fetched, strict=True):
                pieces[i] = piece
                self._keep(names[i], piece)
        return [piece for piece in pieces if piece is not None]

    def forget(self, key: str) -> bool:
        folder = self._root / self._folder(key)
        if not folder.is_dir():
            return self._source.forget(key)
        shutil.rmtree(folder, ignore_errors=True)
        warnings.warn(
            f"copies of {self.name}/{key} in {self._root} were damaged; it is read again from "
            "the source",
            RuntimeWarning,
            stacklevel=2,
        )
        with self._lock:
            self._held, self._added = self._count(), 0
        return True

    def size(self, key: str) -> int | None:
        return self._source.size(key)

    def sizes(self, prefix: str) -> dict[str, int]:
        return self._source.sizes(prefix)

    def write(self, key: str, pieces: Sequence[bytes]) -> None:
        self._source.write(key, pieces)

    def delete(self, key: str) -> None:
        self._source.delete(key)

    def _folder(self, key: str) -> str:
        """Folder of a file of this very cache in the mirror."""
        if not self._folder_of_cache:
            root = hashlib.sha256(self._source.read(ROOT_KEY)).hexdigest()
            self._folder_of_cache = f"{_flat(self.name)}-{root[:16]}"
        return f"{self._folder_of_cache}/{_flat(key)}"

    def _copy(self, name: str, size: int) -> bytes | None:
        try:
            piece = self._mirror.read(name)
        except (OSError, CacheError):
            return None
        return piece if len(piece) == size else None

    def _keep(self, name: str, piece: bytes) -> None:
        with self._lock:
            if self._added > self._max_bytes // _COUNTS:
                self._held, self._added = self._count(), 0
            if self._is_full or self._held + len(piece) > self._max_bytes:
                return
            try:
                _write_copy(self._root / name, piece)
            except FileNotFoundError:
                return  # another process dropped the copies of this file
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                self._is_full = True
                warnings.warn(
                    f"the disk under {self._root} is full; what is read is no longer kept there",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
            self._held += len(piece)
            self._added += len(piece)

    def _count(self) -> int:
        return sum(status.st_size for _, status in files_below(self._root))


def _write_copy(path: Path, piece: bytes) -> None:
    """Another process may keep the same piece at this moment: the partial file is ours only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(piece)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _flat(name: str) -> str:
    """A name as one path component."""
    return name.replace("%", "%25").replace("/", "%2F").replace(":", "%3A")
