"""Who may write which parts of a cache."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mfdetr_cache.cache.manifest import status_key
from mfdetr_cache.cache.partition import WHOLE, Partition
from mfdetr_cache.cache.storage.protocol import Storage, explained
from mfdetr_cache.errors import CacheError
from mfdetr_cache.files import NOT_ALLOWED


@contextlib.contextmanager
def locked(storage: Storage, partition: Partition = WHOLE) -> Iterator[None]:
    """Own the parts of a partition; all parts, when it is the only one.

    In an object store there are no locks.

    Args:
        storage: Where the cache is.
        partition: Which parts.

    Yields:
        Nothing.

    Raises:
        CacheError: If another process owns one of them, or the place may not be written to.
    """
    shared = partition.count > 1
    # Partitions share the cache's lock among each other and not with a writer of everything.
    wanted = [(".writer.lock", fcntl.LOCK_SH if shared else fcntl.LOCK_EX)]
    if shared:
        name = f".writer-{partition.number}-of-{partition.count}.lock"
        wanted.append((name, fcntl.LOCK_EX))
    with contextlib.ExitStack() as held:
        for name, kind in wanted if storage.folder is not None else ():
            assert storage.folder is not None
            with explained(storage):
                lock = _opened(storage.folder / status_key() / name)
            held.callback(os.close, lock)
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CacheError(
                    f"{storage.name} is being written by another process; wait for it"
                ) from None
        yield


def _opened(path: Path) -> int:
    """A lock file; one on a disk that is read-only can be locked if it is there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in NOT_ALLOWED or not path.exists():
            raise
        return os.open(path, os.O_RDONLY)
