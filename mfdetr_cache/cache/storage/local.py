"""A cache in a local folder."""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from mfdetr_cache.cache.storage.protocol import (
    Storage,
    files_below,
)
from mfdetr_cache.errors import CacheError
from mfdetr_cache.files import replacing

# The disk is asked beforehand for stretches that are longer.
_AT_ONCE = 512 * 1024
# What one call may fill, by POSIX at least 16, on Linux and macOS 1024.
_MOST_BUFFERS = 1000
# Linux only.
_NO_WAIT: int = getattr(os, "RWF_NOWAIT", 0)
# Opening a pipe must not wait for somebody who writes into it.
_READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


class LocalStorage(Storage):
    """Files below a local folder, which need not be there yet."""

    folder: Path

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)

    def read(self, key: str) -> bytes:
        with self._opened(key) as descriptor, open(descriptor, "rb", closefd=False) as file:
            return file.read()

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with self._opened(key) as descriptor:
            return [os.pread(descriptor, size, start) for start, size in ranges]

    def read_into(
        self,
        key: str,
        ranges: Sequence[tuple[int, int]],
        places: Sequence[Sequence[memoryview]],
    ) -> bool:
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
        path = f"{self.folder}/{key}"
        try:
            descriptor = os.open(path, _READ)
            try:
                # A cache from a stranger may hold a pipe or a device, which never ends.
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise CacheError(f"{path} is no regular file: it is none of a cache")
                yield descriptor
            finally:
                os.close(descriptor)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(path) from None
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}") from error

    def size(self, key: str) -> int | None:
        path = self.folder / key
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}") from error
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def sizes(self, prefix: str) -> dict[str, int]:
        files = files_below(self.folder / prefix)
        sizes = {Path(f).relative_to(self.folder).as_posix(): s.st_size for f, s in files}
        return dict(sorted(sizes.items()))

    def write(self, key: str, pieces: Sequence[bytes]) -> None:
        path = self._own(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            file.writelines(pieces)
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)

    def delete(self, key: str) -> None:
        self._own(key).unlink(missing_ok=True)

    def _own(self, key: str) -> Path:
        """The path of a file that may be changed; CacheError where a link leads to other folders.

        In a cache from a stranger it may lead to the folders of whoever repairs or relabels it.
        """
        path = self.folder / key
        if not path.parent.resolve().is_relative_to(self.folder.resolve()):
            raise CacheError(
                f"{path} is behind a link that leaves the cache; nothing was changed there: put "
                "the folder itself in the place of the link"
            )
        return path


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
