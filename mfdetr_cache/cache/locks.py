"""Who may write which parts of a cache."""

import contextlib
import fcntl
from collections.abc import Iterator

from mfdetr_cache.cache.manifest import status_key
from mfdetr_cache.cache.partition import WHOLE, Partition
from mfdetr_cache.cache.storage.protocol import Storage, explained
from mfdetr_cache.errors import CacheError
from mfdetr_cache.files import locked_file


@contextlib.contextmanager
def locked(storage: Storage, partition: Partition = WHOLE) -> Iterator[None]:
    """Own the parts of a partition; all parts, when it is the only one.

    In an object store there are no locks. CacheError if another process owns one of them, or
    the place may not be written to.
    """
    shared = partition.count > 1
    # Partitions share the cache's lock among each other and not with a writer of everything.
    wanted = [(".writer.lock", fcntl.LOCK_SH if shared else fcntl.LOCK_EX)]
    if shared:
        name = f".writer-{partition.number}-of-{partition.count}.lock"
        wanted.append((name, fcntl.LOCK_EX))
    busy = CacheError(f"{storage.name} is being written by another process; wait for it")
    with contextlib.ExitStack() as held:
        if storage.folder is not None:
            for name, kind in wanted:
                with explained(storage):
                    path = storage.folder / status_key() / name
                    held.enter_context(locked_file(path, busy, kind))
        yield
