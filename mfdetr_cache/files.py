"""Files that are whole or not there, and disks that are full, in words a person can act on."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mfdetr_cache.errors import MfdetrError, OutputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EROFS, errno.EPERM)
NO_SUCH_PLACE = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


def disk_error(error: BaseException) -> int:
    """What a disk said, where an exception comes from one that is full or may not be written.

    torch and safetensors raise their own exceptions when a write fails: what the operating system
    said is then among the causes, or only in the text.

    Args:
        error: What was raised.

    Returns:
        One of ``DISK_FULL``, ``NOT_ALLOWED`` or ``NO_SUCH_PLACE``; 0 for anything else.
    """
    found: BaseException | None = error
    while found is not None:
        number = found.errno if isinstance(found, OSError) else None
        if number is None and (said := re.search(r"\(os error (\d+)\)", str(found))):
            number = int(said[1])
        if number in (*DISK_FULL, *NOT_ALLOWED, *NO_SUCH_PLACE):
            return int(number or 0)
        found = found.__cause__ or found.__context__
    return 0


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what comes of a disk that is full or may not be written into one line.

    Args:
        path: What is being written, for the message.

    Yields:
        Nothing.

    Raises:
        OutputError: If the disk is full or may not be written.
    """
    try:
        yield
    except MfdetrError:
        raise
    except Exception as error:  # whatever the library that writes makes of it
        number = disk_error(error)
        if number in DISK_FULL:
            raise OutputError(
                f"{path} cannot be written, the disk is full; what was there before is kept: make "
                "room and run it again"
            ) from error
        if number:
            raise OutputError(f"{path} cannot be written: {os.strerror(number)}") from error
        raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Replace a file by a whole new one, or leave it as it is.

    Args:
        path: The file.

    Yields:
        What to write to, in the same folder; it takes the file's place at the end.

    Raises:
        OutputError: If the disk is full or may not be written.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            # It would keep the room that somebody makes.
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by a whole new one; its folder is made if needed.

    Args:
        path: The file.
        data: Its new content.

    Raises:
        OutputError: If the disk is full or may not be written.
    """
    make_folder(path.parent)
    with whole_file(path) as partial:
        partial.write_bytes(data)


def is_taken(folder: Path) -> bool:
    """Whether something is there already that a new folder would mix with.

    Args:
        folder: Where a folder is to be made.

    Returns:
        False for a folder that is empty or not there.
    """
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there yet.

    Args:
        path: The folder.

    Raises:
        OutputError: If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {path} cannot be made: {error.strerror}") from error
