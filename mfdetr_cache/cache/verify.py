"""Checks a cache against its sealed documents: sizes and indexes, or the hash of every file."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mfdetr_cache.cache.annotations import read_annotations, seal_key, version_numbers
from mfdetr_cache.cache.foundation import FOUNDATION_KEY, Opened
from mfdetr_cache.cache.manifest import CERTIFICATES_KEY, manifest_key, read_manifest
from mfdetr_cache.cache.records import FileRecord
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import Part
from mfdetr_cache.cache.shards import ShardReader
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import CacheError

_BLOCK = 2**24


@dataclass(frozen=True, slots=True)
class PartCheck:
    """What was found in one part, of ``num_bytes``: one line per fault, none when it is whole."""

    num_bytes: int
    faults: tuple[str, ...]


def check_part(storage: Storage, root: Root, part: Part, *, full: bool) -> PartCheck:
    """Check one part.

    ``full`` reads every byte and compares its hash with the manifest's; else only sizes and shard
    indexes are looked at.
    """
    try:
        manifest = read_manifest(storage, root, part)
    except CacheError as error:
        return PartCheck(0, (str(error),))
    if manifest is None:
        where = manifest_key(part)
        return PartCheck(0, (f"{part} was never sealed ({where} is missing)",))
    faults = [f"{part}: {fault}" for fault in _file_faults(storage, manifest.files, full=full)]
    if not full and not faults:
        for spec in root.arrays[part.view].values():
            key = spec.key_of_part(part.number)
            if spec.shard is None:
                continue
            try:
                sha256 = bytes.fromhex(manifest.files[key].index_sha256)
                ShardReader.open(storage, key, spec.chunks_per_part, sha256)
            except CacheError:
                faults.append(f"{part}: {key} has a damaged index or is another file")
    return PartCheck(sum(f.num_bytes for f in manifest.files.values()), tuple(faults))


def check_foundation(storage: Storage, opened: Opened, *, full: bool) -> tuple[str, ...]:
    """Check what was written when the cache was created, its annotations left out."""
    faults = _file_faults(storage, opened.foundation.files, full=full)
    # The root may be whole as a document and still have other bytes; it is named once.
    named = " ".join(opened.faults)
    return (*opened.faults, *(f for f in faults if f.split(" ")[0] not in named))


def check_annotations(storage: Storage, root: Root, number: int, *, full: bool) -> tuple[str, ...]:
    """Check a version of the annotations."""
    if number not in version_numbers(storage):
        return (f"annotations {number} were never sealed ({seal_key(number)} is missing)",)
    try:
        record = read_annotations(storage, root, number)
    except CacheError as error:
        return (str(error),)
    return tuple(_file_faults(storage, record.columns.files, full=full))


def annotation_versions(storage: Storage) -> tuple[int, ...]:
    """Numbers of the versions that there must be, rising: the first, and whichever is sealed."""
    return tuple(sorted({0, *version_numbers(storage)}))


def unknown_files(storage: Storage, opened: Opened) -> tuple[str, ...]:
    """Keys of files below a cache that are none of its own: nothing reads them.

    Hidden files and what a killed writing leaves are not among them.
    """
    root = opened.root
    known = {FOUNDATION_KEY, *opened.foundation.files}
    for part in root.layout.parts:
        known.add(manifest_key(part))
        known.update(a.key_of_part(part.number) for a in root.arrays[part.view].values())
    for number in version_numbers(storage):
        known.add(seal_key(number))
        with contextlib.suppress(CacheError):
            known.update(read_annotations(storage, root, number).columns.files)

    def is_unknown(key: str) -> bool:
        name = key.rpartition("/")[2]
        return not (key in known or key.startswith(CERTIFICATES_KEY) or name.startswith("."))

    return tuple(k for k in storage.sizes("") if is_unknown(k) and not k.endswith(".partial"))


def _file_faults(storage: Storage, files: Mapping[str, FileRecord], *, full: bool) -> Iterator[str]:
    for key, expected in sorted(files.items()):
        try:
            fault = _fault_of(storage, key, expected, full=full)
        except (CacheError, FileNotFoundError) as error:
            fault = str(error)
        if fault is not None:
            yield f"{key} {fault}"


def _fault_of(storage: Storage, key: str, expected: FileRecord, *, full: bool) -> str | None:
    folder = storage.folder
    # A link to another disk may be wanted and is still no copy that can be moved.
    if folder is not None and not (folder / key).resolve().is_relative_to(folder.resolve()):
        return "is a link that leaves the cache"
    size = storage.size(key)
    if size is None:
        return "is missing"
    if size != expected.num_bytes:
        return f"has {size} bytes instead of {expected.num_bytes}"
    if (
        full
        and _sha256_of(storage, key, size) != expected.sha256
        and not (storage.forget(key) and _sha256_of(storage, key, size) == expected.sha256)
    ):
        return "has a wrong checksum: it is not what was written"
    return None


def _sha256_of(storage: Storage, key: str, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, _BLOCK):
        digest.update(storage.read_ranges(key, [(start, min(_BLOCK, size - start))])[0])
    return digest.hexdigest()
