"""Checks a cache against its manifests: sizes and indexes, or every checksum."""

from collections.abc import Iterator
from dataclasses import dataclass

from crc32c import crc32c

from mfdetr_cache.cache.manifest import manifest_key, read_foundation, read_manifest
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.schema import Part
from mfdetr_cache.cache.shards import ShardReader
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import CacheError

_BLOCK = 2**24


@dataclass(frozen=True, slots=True)
class PartCheck:
    """What was found in one part.

    Attributes:
        part: The part.
        num_bytes: Bytes of its files.
        faults: One line per fault; empty when it is whole.
    """

    part: Part
    num_bytes: int
    faults: tuple[str, ...]


def check_parts(cache: FeatureCache, *, full: bool) -> Iterator[PartCheck]:
    """Check every part of a cache.

    Args:
        cache: The cache.
        full: Read every byte and compare its checksum with the manifest's; else only sizes and
            shard indexes are looked at.

    Yields:
        One result per part.
    """
    for part in cache.layout.parts:
        yield check_part(cache, part, full=full)


def check_foundation(storage: Storage, *, full: bool) -> tuple[str, ...]:
    """Check what was written when the cache was created: metadata, ground truth, transforms.

    Args:
        storage: Where the cache is.
        full: Compare checksums too.

    Returns:
        One line per fault.
    """
    try:
        files = read_foundation(storage)
    except CacheError as error:
        return (str(error),)
    faults = (
        (key, _check_file(storage, key, expected, full=full)) for key, expected in files.items()
    )
    return tuple(f"{key} {fault}" for key, fault in faults if fault is not None)


def check_part(cache: FeatureCache, part: Part, *, full: bool) -> PartCheck:
    """Check one part; see :func:`check_parts`."""
    storage = cache.storage
    arrays = cache.views[part.view].arrays.values()
    indexed = {a.path: a.chunks_per_part for a in arrays if a.shard is not None}
    try:
        manifest = read_manifest(storage, part)
    except CacheError as error:
        return PartCheck(part, 0, (str(error),))
    if manifest is None:
        where = manifest_key(part)
        return PartCheck(part, 0, (f"{part} was never sealed ({where} is missing)",))
    faults: list[str] = []
    total = 0
    for key, expected in sorted(manifest["files"].items()):
        total += expected["bytes"]
        fault = _check_file(storage, key, expected, full=full)
        if fault is None and not full:
            fault = _check_index(storage, key, indexed.get(key.split("/c/")[0]))
        if fault is not None:
            faults.append(f"{part}: {key} {fault}")
    return PartCheck(part, total, tuple(faults))


def _check_file(storage: Storage, key: str, expected: dict[str, int], *, full: bool) -> str | None:
    size = storage.size(key)
    if size is None:
        return "is missing"
    if size != expected["bytes"]:
        return f"has {size} bytes instead of {expected['bytes']}"
    if full and _crc32c_of(storage, key, size) != expected["crc32c"]:
        return "has a wrong checksum: its bytes changed on disk"
    return None


def _check_index(storage: Storage, key: str, num_chunks: int | None) -> str | None:
    if num_chunks is None:
        return None
    try:
        ShardReader.open(storage, key, num_chunks)
    except CacheError:
        return "has a damaged index"
    return None


def _crc32c_of(storage: Storage, key: str, size: int) -> int:
    checksum = 0
    for start in range(0, size, _BLOCK):
        length = min(_BLOCK, size - start)
        checksum = crc32c(storage.read_ranges(key, [(start, length)])[0], checksum)
    return checksum
