"""Where the files of a cache are: a local folder, or an object store behind a URL.

Keys are relative paths with ``/``. A file is there whole or not at all, in a folder by rename
after fsync, in an object store because a put is. Credentials come from the environment or the
store's own configuration; they are never part of a name here, and never written.
"""

import contextlib
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import obstore
from crc32c import crc32c
from obstore.exceptions import BaseError
from obstore.store import MemoryStore, from_url

from mfdetr_cache.errors import CacheError
from mfdetr_cache.files import DISK_FULL, NOT_ALLOWED

# The file that makes a place a cache.
ROOT_KEY = "zarr.json"

_MEMORY: dict[str, MemoryStore] = {}
# The disk is asked beforehand for stretches that are longer.
_AT_ONCE = 512 * 1024
# What one call may fill, by POSIX at least 16, on Linux and macOS 1024.
_MOST_BUFFERS = 1000
# Linux only.
_NO_WAIT: int = getattr(os, "RWF_NOWAIT", 0)
_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "http", "https", "memory", "file")
# How often a process looks at what others keep in a mirror, while it fills it once.
_LOOKS = 64


class Storage(Protocol):
    """Files by key.

    Attributes:
        name: What people call the place; for messages.
    """

    name: str

    @property
    def folder(self) -> Path | None:
        """The local folder; None where there is none."""

    def read(self, key: str) -> bytes:
        """A whole file.

        Args:
            key: Its key.

        Returns:
            Its bytes.

        Raises:
            FileNotFoundError: If there is none.
        """

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Some parts of a file; shorter than asked for where the file ends early.

        Args:
            key: Its key.
            ranges: Offset and length of each part, in bytes, neighbours in order.

        Returns:
            One piece per range.

        Raises:
            FileNotFoundError: If there is none.
        """

    def read_into(
        self,
        key: str,
        ranges: Sequence[tuple[int, int]],
        places: Sequence[Sequence[memoryview]],
    ) -> bool:
        """The same into memory that is there, with as few calls as possible: threads share one GIL.

        Args:
            key: Its key.
            ranges: Offset and length of each part, in bytes, neighbours in order.
            places: Where each part goes, piece by piece; as long as the part.

        Returns:
            Whether all of it was read; not where the file ends early.

        Raises:
            FileNotFoundError: If there is none.
        """
        # For whoever has no better way.
        return _scattered(self.read_ranges(key, ranges), places)

    def size(self, key: str) -> int | None:
        """Bytes of a file; None if there is none.

        Args:
            key: Its key.

        Returns:
            Bytes.
        """

    def sizes(self, prefix: str) -> dict[str, int]:
        """Files below a prefix.

        Args:
            prefix: Such as ``views/base``; empty for all.

        Returns:
            Key to bytes.
        """

    def write(self, key: str, pieces: Sequence[bytes]) -> tuple[int, int]:
        """Write a file so that it is either absent or whole.

        Args:
            key: Its key.
            pieces: Its bytes, in order.

        Returns:
            Size in bytes and CRC-32C of the file.
        """

    def delete(self, key: str) -> None:
        """Remove a file; nothing happens where there is none.

        Args:
            key: Its key.
        """


Location = str | Path | Storage


def open_storage(location: Location) -> Storage:
    """The place a path or a URL speaks of; nothing is touched yet.

    Args:
        location: A folder, a URL such as ``s3://bucket/train.zarr``, or a storage.

    Returns:
        The storage.

    Raises:
        CacheError: If the URL cannot be used.
    """
    if not isinstance(location, (str, Path)):
        return location
    text = str(location)
    scheme, separator, rest = text.partition("://")
    if isinstance(location, Path) or not separator:
        return LocalStorage(Path(location))
    if scheme == "file":
        return LocalStorage(Path(rest))
    if scheme not in _SCHEMES:
        known = ", ".join(f"{s}://" for s in _SCHEMES)
        raise CacheError(f"{text}: unknown kind of store {scheme}://; use a folder, or {known}")
    return ObjectStorage(text.rstrip("/"))


@contextlib.contextmanager
def explained(storage: Storage) -> Iterator[None]:
    """Turn what an operating system says about a disk into a line a person can act on.

    Args:
        storage: Where the cache is, for the message.

    Yields:
        Nothing.

    Raises:
        CacheError: If the disk is full or may not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise CacheError(
                f"the disk under {storage.name} is full; sealed parts are kept, make room and run "
                "the same command again to go on"
            ) from error
        if error.errno in NOT_ALLOWED:
            raise CacheError(f"cannot write to {storage.name}: {error.strerror}") from error
        raise


def checksum_of(pieces: Sequence[bytes]) -> tuple[int, int]:
    """Size and CRC-32C of a file.

    Args:
        pieces: Its bytes, in order.

    Returns:
        Bytes and checksum.
    """
    checksum = 0
    for piece in pieces:
        checksum = crc32c(piece, checksum)
    return sum(map(len, pieces)), checksum


class LocalStorage(Storage):
    """Files below a local folder.

    Args:
        folder: The folder; it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = str(folder)

    @property
    def folder(self) -> Path | None:
        """The folder."""
        return self._folder

    def read(self, key: str) -> bytes:
        """A whole file; see :class:`Storage`."""
        return (self._folder / key).read_bytes()

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Some parts of a file; see :class:`Storage`."""
        with self._opened(key) as descriptor:
            return [os.pread(descriptor, size, start) for start, size in ranges]

    def read_into(
        self,
        key: str,
        ranges: Sequence[tuple[int, int]],
        places: Sequence[Sequence[memoryview]],
    ) -> bool:
        """Some parts of a file into memory that is there; see :class:`Storage`."""
        if not hasattr(os, "preadv"):
            return super().read_into(key, ranges, places)
        with self._opened(key) as descriptor:
            if (size := sum(size for _, size in ranges)) > _AT_ONCE:
                _ask_for(descriptor, ranges[0][0], sum(ranges[-1]))
            done = 0
            for start, buffers in _neighbours(ranges, places):
                done += os.preadv(descriptor, buffers, start)
            return done == size

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        # os.open and not pathlib's: an image lies in a dozen files.
        descriptor = os.open(f"{self._folder}/{key}", os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def size(self, key: str) -> int | None:
        """Bytes of a file; see :class:`Storage`."""
        try:
            return (self._folder / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Files below a prefix; see :class:`Storage`."""
        found = _files_below(self._folder / prefix)
        sizes = {Path(f).relative_to(self._folder).as_posix(): s.st_size for f, s in found}
        return dict(sorted(sizes.items()))

    def write(self, key: str, pieces: Sequence[bytes]) -> tuple[int, int]:
        """Write a file and make it survive a power cut; see :class:`Storage`."""
        path = self._folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        return checksum_of(pieces)

    def delete(self, key: str) -> None:
        """Remove a file; see :class:`Storage`."""
        (self._folder / key).unlink(missing_ok=True)


class ObjectStorage(Storage):
    """Objects below a URL, through obstore; it asks again when a connection breaks.

    Args:
        url: Such as ``s3://bucket/train.zarr``.
        max_retries: How often a request is sent again after a broken connection.

    Raises:
        CacheError: If the URL or the environment's settings cannot be used.
    """

    def __init__(self, url: str, max_retries: int = 10) -> None:
        self.name = url
        self._max_retries = max_retries
        if url.startswith("memory://"):
            self._store: Any = _MEMORY.setdefault(url, MemoryStore())
            return
        with self._explained():
            # A store on this machine or in a private network often speaks plain HTTP.
            plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
            options: Any = {"allow_http": True} if plain else {}
            retry: Any = {"max_retries": max_retries}
            self._store = from_url(url, client_options=options, retry_config=retry)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process connects by itself, with the credentials of its own environment.
        return ObjectStorage, (self.name, self._max_retries)

    @property
    def folder(self) -> Path | None:
        """None: there is no folder."""
        return None

    def read(self, key: str) -> bytes:
        """A whole object; see :class:`Storage`."""
        with self._explained():
            return bytes(obstore.get(self._store, key).bytes())

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Some parts of an object; see :class:`Storage`."""
        starts, lengths = [r[0] for r in ranges], [r[1] for r in ranges]
        with self._explained():
            found = obstore.get_ranges(self._store, key, starts=starts, lengths=lengths)
        return [bytes(piece) for piece in found]

    def size(self, key: str) -> int | None:
        """Bytes of an object; see :class:`Storage`."""
        try:
            with self._explained():
                return int(obstore.head(self._store, key)["size"])
        except FileNotFoundError:
            return None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Objects below a prefix; see :class:`Storage`."""
        found: dict[str, int] = {}
        with self._explained():
            for page in obstore.list(self._store, prefix or None):
                found |= {str(o["path"]): int(o["size"]) for o in page}
        return dict(sorted(found.items()))

    def write(self, key: str, pieces: Sequence[bytes]) -> tuple[int, int]:
        """Put an object; see :class:`Storage`."""
        with self._explained():
            obstore.put(self._store, key, b"".join(pieces))
        return checksum_of(pieces)

    def delete(self, key: str) -> None:
        """Remove an object; see :class:`Storage`."""
        with self._explained():
            obstore.delete(self._store, key)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what a store says into a line a person can act on."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (BaseError, ValueError) as error:
            # The store's own words are long and repeat themselves; the first line says it.
            reason = str(error).splitlines()[0][:300]
            raise CacheError(
                f"{self.name} cannot be used: {reason}; check the URL, the network and the "
                "credentials in the environment"
            ) from error


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
        found = [(s.st_mtime_ns, s.st_size, f) for f, s in _files_below(self._root)]
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


def _files_below(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Files and what is known of each; one that another process renames or removes is left out."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)  # noqa: PTH118 - a listing may have a million files
            try:
                yield path, os.stat(path)  # noqa: PTH116
            except FileNotFoundError:
                continue


def _ask_for(descriptor: int, start: int, stop: int) -> None:
    """Have the disk begin on a stretch, unless its last byte is in memory already.

    Asking for what is in memory takes a tenth of a millisecond; looking at one byte does not.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    if _NO_WAIT:
        with contextlib.suppress(OSError):  # not in memory, or a disk that cannot tell
            if os.preadv(descriptor, [bytearray(1)], stop - 1, _NO_WAIT) == 1:
                return
    os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)


def _neighbours(
    ranges: Sequence[tuple[int, int]], places: Sequence[Sequence[memoryview]]
) -> list[tuple[int, list[memoryview]]]:
    """Start of each stretch that can be read at once, and where its bytes go."""
    stretches: list[tuple[int, list[memoryview]]] = []
    stop = -1
    for (offset, size), buffers in zip(ranges, places, strict=True):
        if offset == stop and len(stretches[-1][1]) + len(buffers) <= _MOST_BUFFERS:
            stretches[-1][1].extend(buffers)
        else:
            stretches.append((offset, list(buffers)))
        stop = offset + size
    return stretches


def _scattered(pieces: Sequence[bytes], places: Sequence[Sequence[memoryview]]) -> bool:
    """Copy what was read to where it should be; whether it was as long as expected."""
    for piece, buffers in zip(pieces, places, strict=True):
        first = 0
        for buffer in buffers:
            part = piece[first : first + len(buffer)]
            if len(part) != len(buffer):
                return False
            buffer[:] = part
            first += len(buffer)
    return True


def _flat(name: str) -> str:
    """A name as one path component."""
    return name.replace("%", "%25").replace("/", "%2F").replace(":", "%3A")
