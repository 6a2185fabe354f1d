"""What a cache needs of the place where its files are."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from mfdetr_cache.errors import CacheError
from mfdetr_cache.files import DISK_FULL, FAILING, NOT_ALLOWED

# The file that makes a place a cache.
ROOT_KEY = "zarr.json"


class Storage(Protocol):
    """Files by key.

    Attributes:
        name: What people call the place; for messages.
        annotations: Which version of a cache's annotations is read; None for the newest.
        folder: The local folder; None where there is none.
    """

    name: str
    annotations: int | None = None
    folder: Path | None = None

    def read(self, key: str) -> bytes:
        """A whole file; FileNotFoundError if there is none."""

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Parts of a file by offset and length; shorter than asked for where the file ends early.

        FileNotFoundError if there is none.
        """

    def read_into(
        self,
        key: str,
        ranges: Sequence[tuple[int, int]],
        places: Sequence[Sequence[memoryview]],
    ) -> bool:
        """The same into memory that is there, with as few calls as possible: threads share one GIL.

        Neighbours are in order; ``places`` are the pieces of memory of each part, as long
        as the part. False where the file ends early, FileNotFoundError if there is none.
        """
        # For whoever has no better way.
        for piece, buffers in zip(self.read_ranges(key, ranges), places, strict=True):
            first = 0
            for buffer in buffers:
                part = piece[first : first + len(buffer)]
                if len(part) != len(buffer):
                    return False
                buffer[:] = part
                first += len(buffer)
        return True

    def forget(self, key: str) -> bool:  # noqa: ARG002
        """Drop copies of a file that turned out to be damaged.

        True if it is worth reading again: there were copies, or it came over a network.
        """
        return False

    def size(self, key: str) -> int | None:
        """Bytes of a file; None if there is none."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Files below a prefix such as ``views/base``; empty for all."""

    def write(self, key: str, pieces: Sequence[bytes]) -> None:
        """Write pieces one behind the other as a file that is either absent or whole."""

    def delete(self, key: str) -> None:
        """Remove a file; nothing happens where there is none."""


def read_whole(storage: Storage, key: str, is_whole: Callable[[bytes], object]) -> bytes:
    """A whole file, read again where that is worth it if it is not what it must be."""
    data = storage.read(key)
    if not is_whole(data) and storage.forget(key):
        data = storage.read(key)
    return data


@contextlib.contextmanager
def explained(storage: Storage) -> Iterator[None]:
    """Turn a disk that is full or may not be written into a CacheError that names the storage."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise CacheError(
                f"the disk under {storage.name} is full; sealed parts are kept, make room and run "
                "the same command again to go on"
            ) from error
        if error.errno in (*NOT_ALLOWED, *FAILING):
            raise CacheError(f"cannot write to {storage.name}: {error.strerror}") from error
        raise


def files_below(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Files and what is known of each; one that another process renames or removes is left out."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)  # noqa: PTH118 - a listing may have a million files
            try:
                yield path, os.stat(path)  # noqa: PTH116
            except OSError:  # also a link that leads nowhere
                continue
