"""Which storage a location means."""

from pathlib import Path

from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.object_store import ObjectStorage
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import CacheError

_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "http", "https", "memory", "file")


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
