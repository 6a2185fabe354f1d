"""Atomic writes, and one-line errors for disks that are full or read-only."""

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mfdetr_cache.errors import MfdetrError, OutputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EROFS, errno.EPERM)
# Lustre without its flock option, some network disks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
NO_SUCH_PLACE = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
# Too large for ``ulimit -f`` or FAT, too many files, a disk that breaks or went away.
FAILING = (errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENXIO)
# Files with these endings are nobody's: half written, or there to be locked.
PARTIAL = ".partial"
LOCK = ".lock"
# What results say of themselves, and where: only those may be written over.
WRITTEN_BY = "mfdetr-cache"
_MARKED = 4096


def disk_error(error: BaseException) -> int:
    """The number of a disk that is full, not allowed or not there, if a failed write caused this.

    0 for any other error.

    torch and safetensors raise their own exceptions when a write fails: the operating system's
    error is then among the causes, or only in the text.
    """
    found: BaseException | None = error
    while found is not None:
        number = found.errno if isinstance(found, OSError) else None
        if number is None and (said := re.search(r"\(os error (\d+)\)", str(found))):
            number = int(said[1])
        if number in (*DISK_FULL, *NOT_ALLOWED, *NO_SUCH_PLACE, *FAILING):
            return int(number or 0)
        found = found.__cause__ or found.__context__
    return 0


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise OutputError, naming ``path``, for a disk that is full or may not be written."""
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
    """Yield a temporary file in the same folder that replaces ``path`` at the end; OutputError.

    So does a device in its place, and another process that is writing the same file.
    """
    with writing(path), _owned(path.with_name(path.name + PARTIAL), path):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OutputError(f"{path} is no regular file: it would be replaced by one")
        with replacing(path) as partial:
            yield partial


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file in the same folder that replaces ``path``; OSError as it comes."""
    partial = path.with_name(path.name + PARTIAL)
    if _is_shared(partial):
        partial.unlink()  # the name alone: what it leads to is somebody else's
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        # On a full disk it would keep the room that somebody makes.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _is_shared(partial: Path) -> bool:
    """Whether somebody else's file would be written through a temporary one: it is a link."""
    if partial.is_symlink():
        return partial.is_file() or not partial.exists()
    return partial.is_file() and partial.stat().st_nlink > 1


def unlink_from_others(path: Path) -> None:
    """Make a file that is to be appended to its folder's own, with the same content; OutputError.

    It may be a link, or have one elsewhere: a run folder of somebody else could bring such.
    """
    if _is_shared(path):
        with writing(path):
            data = read_regular(path) if path.exists() else b""
        write_atomically(path, data)


@contextlib.contextmanager
def _owned(partial: Path, path: Path) -> Iterator[None]:
    """Own a temporary file, which two processes must not fill at once; OutputError if one does."""
    busy = OutputError(f"{path} is being written by another process")
    if _is_shared(partial):
        raise OutputError(f"{path} cannot be written: {partial} is a link, remove it")
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(partial, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass  # a network disk may know no locks
        # Whoever had it may have finished since it was opened.
        if not partial.exists() or not os.path.samestat(partial.stat(), os.fstat(descriptor)):
            raise busy
        yield
    finally:
        os.close(descriptor)


def require_free(path: Path, option: str, mark: bytes = b"") -> None:
    """Refuse a place for a result where there is something else.

    Args:
        path: The place.
        option: The option that named it, for the message.
        mark: What every file of this kind has among its first bytes if it is ours, and may be
            replaced; without one only empty files are.

    Raises:
        OutputError: If there is a folder, a device, or a file that this tool did not write.
    """
    try:
        found = read_regular(path, _MARKED)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{option} {path} cannot be written: {error.strerror}") from error
    if found and not (mark and mark in found):
        raise OutputError(
            f"{option} {path} is there and was not written by this command; nothing was touched, "
            "choose another name or remove it"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file as a whole; its folder is made if needed. OutputError if that fails."""
    make_folder(path.parent)
    with whole_file(path) as partial:
        partial.write_bytes(data)


def is_taken(folder: Path) -> bool:
    """Whether the path is a file or a folder with more in it than locks and half-written files."""
    if not folder.is_dir():
        return folder.exists()
    return any(path.suffix not in (PARTIAL, LOCK) for path in folder.iterdir())


@contextlib.contextmanager
def locked_file(path: Path, busy: MfdetrError, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Own a lock file, or share it with ``LOCK_SH``; raises ``busy`` if another process has it.

    On a disk that knows no locks nobody is kept out.
    The file stays: who removes it could take it from under somebody else's lock.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        # On a disk that is read-only it can be locked if it is there.
        if error.errno not in NOT_ALLOWED or not path.exists():
            raise
        descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(descriptor)):
            raise busy  # whoever had it has removed it since it was opened
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def owned_results(folder: Path) -> Iterator[None]:
    """Own a folder of results, which two processes would mix; OutputError if one writes there."""
    make_folder(folder)
    lock = folder / f".writer{LOCK}"
    busy = OutputError(
        f"{folder} is being written by another process; wait for it, or give another --out"
    )
    with contextlib.ExitStack() as held:
        with writing(folder):
            held.enter_context(locked_file(lock, busy))
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def read_regular(path: Path, most: int = -1) -> bytes:
    """The first bytes of a regular file; OSError for a pipe or a device, which may never end."""
    with open(path, "rb", opener=opened_regular) as file:
        return file.read(most)


def opened_regular(path: str, flags: int) -> int:
    """An opener for ``open`` that refuses pipes and devices with an OSError."""
    # Opening a pipe must not wait for somebody at its other end.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "is no regular file", str(path))
    return descriptor


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing; OutputError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {path} cannot be made: {error.strerror}") from error
    except RecursionError as error:
        raise OutputError(f"the folder {str(path)[:60]}... has too many above it") from error


def forget_cached_pages(file: IO[bytes]) -> None:
    """Make the next read of a file come from the disk; where the system cannot, it does not."""
    with contextlib.suppress(AttributeError, OSError):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
