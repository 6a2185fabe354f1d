"""Which storage a location means."""

import re
from pathlib import Path

from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.object_store import ObjectStorage
from mfdetr_cache.cache.storage.protocol import ROOT_KEY, Storage
from mfdetr_cache.errors import CacheError

# At the end of a location: which version of the annotations is read.
_VERSION = re.compile(r"(.+)@(\d{1,6})")
_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "http", "https", "memory", "file")


Location = str | Path | Storage


def open_storage(location: Location) -> Storage:
    """The place a path or a URL speaks of; nothing is touched yet.

    ``@N`` behind a cache that is there chooses a version of its annotations. CacheError if the
    URL cannot be used.
    """
    if not isinstance(location, (str, Path)):
        return location
    chosen = _VERSION.fullmatch(str(location))
    if chosen and not Path(location).exists():
        storage = _storage_at(Path(chosen[1]) if isinstance(location, Path) else chosen[1])
        if storage.size(ROOT_KEY) is not None:
            storage.annotations = int(chosen[2])
            return storage
    return _storage_at(location)


def _storage_at(location: str | Path) -> Storage:
    text = str(location)
    scheme, separator, rest = text.partition("://")
    if isinstance(location, Path) or not separator:
        return LocalStorage(Path(location))
    if scheme == "file":
        return LocalStorage(Path(rest.removeprefix("localhost")))
    if scheme not in _SCHEMES:
        known = ", ".join(f"{s}://" for s in _SCHEMES)
        raise CacheError(f"{text}: unknown kind of store {scheme}://; use a folder, or {known}")
    return ObjectStorage(text.rstrip("/"))
