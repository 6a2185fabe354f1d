"""A cache in an object store, with copies of what was read on a local disk."""

import os
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.protocol import ROOT_KEY, Storage, checksum_of, files_below
from mfdetr_cache.files import DISK_FULL

# How often a process looks at what others keep in a mirror, while it fills it once.
_LOOKS = 64


class MirroredStorage(Storage):
    """A storage whose parts are kept in a local folder once they were read, up to a size.

    Copies are kept under the checksum of the source's root metadata, which holds the cache's
    identity: another cache under the same URL never meets the copies of the old one. What was used
    longest ago goes first. Several processes may share the folder: each looks now and then at what
    is there, and expects the others to keep as much until the next look as they did until this one.

    Args:
        source: The storage, usually an object store.
        mirror: The local folder.
        max_bytes: Most bytes kept there; some hundredths more where several processes fill it.
    """

    def __init__(self, source: Storage, mirror: Path, max_bytes: int) -> None:
        self.name = source.name
        self._source = source
        self._mirror = LocalStorage(mirror)
        self._root = mirror
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._place = ""
        self._full = False
        mirror.mkdir(parents=True, exist_ok=True)
        self._held = sum(self._mirror.sizes("").values())
        # Kept by this process since it last looked, and by the others until then.
        self._kept, self._by_others = 0, 0

    def __reduce__(self) -> tuple[Any, ...]:
        return MirroredStorage, (self._source, self._root, self._max_bytes)

    @property
    def folder(self) -> Path | None:
        """None: what is in the mirror is only a part."""
        return None

    def read(self, key: str) -> bytes:
        """A whole file; metadata is small and may be repaired, so it is never mirrored."""
        return self._source.read(key)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Some parts of a file, from the mirror where they are there."""
        place = f"{self._cache_place()}/{_flat(key)}"
        names = [f"{place}/{start}-{size}" for start, size in ranges]
        pieces = [
            self._from_mirror(name, size) for name, (_, size) in zip(names, ranges, strict=True)
        ]
        absent = [i for i, piece in enumerate(pieces) if piece is None]
        if absent:
            fetched = self._source.read_ranges(key, [ranges[i] for i in absent])
            for i, piece in zip(absent, fetched, strict=True):
                pieces[i] = piece
                self._keep(names[i], piece)
        return [piece for piece in pieces if piece is not None]

    def size(self, key: str) -> int | None:
        """Bytes of a file; see :class:`Storage`."""
        return self._source.size(key)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Files below a prefix; see :class:`Storage`."""
        return self._source.sizes(prefix)

    def write(self, key: str, pieces: Sequence[bytes]) -> tuple[int, int]:
        """Write to the source; see :class:`Storage`."""
        return self._source.write(key, pieces)

    def delete(self, key: str) -> None:
        """Remove from the source; see :class:`Storage`."""
        self._source.delete(key)

    def _cache_place(self) -> str:
        """Folder of this very cache in the mirror."""
        if not self._place:
            root = checksum_of([self._source.read(ROOT_KEY)])[1]
            self._place = f"{_flat(self.name)}-{root:08x}"
        return self._place

    def _from_mirror(self, name: str, size: int) -> bytes | None:
        try:
            piece = self._mirror.read(name)
            os.utime(self._root / name)
        except OSError:
            return None
        return piece if len(piece) == size else None

    def _keep(self, name: str, piece: bytes) -> None:
        if len(piece) > self._max_bytes or self._full:
            return
        with self._lock:
            if self._kept > self._max_bytes // _LOOKS:
                self._look()
            if self._held + self._by_others + len(piece) > self._max_bytes:
                self._make_room(len(piece))
            try:
                self._write_copy(self._root / name, piece)
            except FileNotFoundError:
                return  # another process made room, and this was among what it dropped
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                self._full = True
                warnings.warn(
                    f"the disk under {self._root} is full; what is read is no longer kept there",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
            self._held += len(piece)
            self._kept += len(piece)

    def _look(self) -> list[tuple[int, int, str]]:
        """When each copy was used, its bytes and its path."""
        found = [(s.st_mtime_ns, s.st_size, f) for f, s in files_below(self._root)]
        held = sum(size for _, size, _ in found)
        self._by_others = max(0, held - self._held)
        self._held, self._kept = held, 0
        return found

    def _write_copy(self, path: Path, piece: bytes) -> None:
        """Another process may keep the same piece at this moment: the partial file is ours only."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(piece)
                file.flush()
                os.fsync(descriptor)
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def _make_room(self, needed: int) -> None:
        """Drop what was used longest ago, a tenth of the room at a time."""
        found = self._look()
        goal = self._max_bytes - max(needed + self._by_others, self._max_bytes // 10)
        for _, size, file in sorted(found):
            if self._held <= goal:
                return
            Path(file).unlink(missing_ok=True)
            self._held -= size


def _flat(name: str) -> str:
    """A name as one path component."""
    return name.replace("%", "%25").replace("/", "%2F").replace(":", "%3A")
