"""What is written when a cache is created: its root, its images, how each view's image is made."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mfdetr_cache.cache.arrays import chunk_keys, image_columns
from mfdetr_cache.cache.columns import Columns
from mfdetr_cache.cache.document import read_document, read_sealed
from mfdetr_cache.cache.file_record import FileRecord
from mfdetr_cache.cache.manifest import (
    Manifest,
    require_files,
    require_names,
    status_key,
    whole_parts,
)
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import ATTRIBUTES_KEY, Part
from mfdetr_cache.cache.storage.protocol import ROOT_KEY, Storage
from mfdetr_cache.errors import MEND, CacheError
from mfdetr_cache.fields import Fields
from mfdetr_cache.sealed import seal

FOUNDATION_KEY = f"{status_key()}/manifest/foundation.json"
ANNOTATIONS = "annotations"
FIRST_ANNOTATIONS_KEY = f"{status_key()}/annotations/000000.json"


@dataclass(frozen=True)
class FoundationRecord:
    """What the foundation's document says: column lengths by path, file records by key.

    Files are those written at creation, but annotations.
    """

    lengths: dict[str, int]
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Opened:
    """A root and its foundation as far as they are whole.

    Attributes:
        root: What the cache is.
        foundation: None where its document is missing or damaged.
        faults: One line for each of the two that is damaged or contradicts the other.
    """

    root: Root
    foundation: FoundationRecord | None
    faults: tuple[str, ...]


def seal_foundation(
    storage: Storage, root: Root, lengths: Mapping[str, int], files: Mapping[str, FileRecord]
) -> None:
    """Write the foundation's document: column lengths by path, file records by key."""
    document = {
        **root.names,
        "root": root.attributes,
        "columns": dict(lengths),
        "files": {key: f.to_dict() for key, f in files.items()},
    }
    storage.write(FOUNDATION_KEY, [seal(document)])


def read_opened(storage: Storage) -> Opened:
    """Root and foundation, each compared with the other.

    The root is the foundation's copy where its own is damaged. CacheError if there is no cache,
    this version does not read it, or both are damaged.
    """
    if storage.folder is not None and not storage.folder.exists():
        raise CacheError(f"cache {storage.name} does not exist; make it with: mfdetr extract")
    attributes, problem = _root_attributes(storage)
    faults: list[str] = []
    kept: Root | None = None
    foundation = None
    try:
        kept, foundation = _read_foundation(storage)
    except FileNotFoundError:
        faults.append(f"{storage.name}/{FOUNDATION_KEY} is missing; {MEND}")
    except CacheError as error:
        faults.append(str(error))
    if kept is not None and _is_foreign(storage, kept, attributes):
        faults.append(f"{storage.name}/{FOUNDATION_KEY} is of another cache; {MEND}")
        kept = None
    if kept is not None:
        if problem is not None or attributes.values != kept.attributes:
            faults.append(
                f"{storage.name}/{ROOT_KEY} is not what the cache was created with; {MEND}"
            )
        return Opened(kept, foundation, tuple(faults))
    if problem is not None:
        raise problem
    return Opened(Root.from_fields(attributes), None, tuple(faults))


def read_root(storage: Storage) -> Root:
    """What a cache is; CacheError as :func:`read_opened`, or if either of the two is damaged."""
    opened = read_opened(storage)
    if opened.faults:
        raise CacheError(opened.faults[0])
    return opened.root


def _root_attributes(storage: Storage) -> tuple[Fields, CacheError | None]:
    """Attributes of the root; where there are none, the reason."""
    nothing = Fields({}, storage.name, CacheError)
    try:
        attributes = read_document(storage, ROOT_KEY).fields("attributes").fields(ATTRIBUTES_KEY)
    except (FileNotFoundError, CacheError):
        reason = f"{storage.name} is no feature cache (no {ATTRIBUTES_KEY} attributes)"
        return nothing, CacheError(reason)
    return Fields(attributes.values, storage.name, CacheError), None


def _is_foreign(storage: Storage, kept: Root, attributes: Fields) -> bool:
    """Whether the foundation, and not the root, is another cache's: annotations name theirs."""
    theirs = attributes.values.get("cache_id")
    if theirs is None or theirs == kept.cache_id:
        return False
    try:
        return bool(read_sealed(storage, FIRST_ANNOTATIONS_KEY)["cache_id"] == theirs)
    except (FileNotFoundError, CacheError):
        return False


def _read_foundation(storage: Storage) -> tuple[Root, FoundationRecord]:
    fields = read_sealed(storage, FOUNDATION_KEY)
    where = f"{storage.name}/{FOUNDATION_KEY}"
    root = Root.from_fields(fields.fields("root"))
    require_names(fields, root, where)
    columns = fields.fields("columns")
    lengths = {path: columns.integer(path, 0, 2**40) for path in columns.values}
    expected = image_columns(root.layout)
    if set(lengths) != set(expected):
        raise CacheError(f"{where} does not name the columns of its layout; {MEND}")
    for path, length in expected.items():
        if length is not None and lengths[path] != length:
            raise CacheError(f"{where} has {lengths[path]} of {path} and not {length}; {MEND}")
    files = {key: FileRecord.from_fields(f) for key, f in fields.fields("files").items()}
    require_files(files, _foundation_keys(root, lengths), where)
    return root, FoundationRecord(lengths, files)


def _foundation_keys(root: Root, lengths: Mapping[str, int]) -> list[str]:
    arrays = [a.path for view in root.arrays.values() for a in view.values()]
    chunks = [k for path, n in lengths.items() for k in chunk_keys(path, root.column(path), n)]
    return [*metadata_keys([*arrays, *lengths], ""), f"{ANNOTATIONS}/{ROOT_KEY}", *chunks]


def metadata_keys(arrays: Iterable[str], top: str) -> list[str]:
    """Metadata files of arrays, by their paths, and of the groups they are in, up to ``top``."""
    groups = {top}
    for path in arrays:
        while path != top:
            groups.add(path)
            path = path.rpartition("/")[0]
    return [f"{path}/{ROOT_KEY}" if path else ROOT_KEY for path in sorted(groups)]


class Foundation:
    """The part of a cache that is written when it is created; what all its views share.

    Attributes:
        storage: Where the cache is.
        path: Name of that place, for messages.
        root: What the cache is.
        spec: The detector it was made with.
        layout: Rows, parts and tokens.
        columns: Ids, names and transforms.
    """

    def __init__(self, storage: Storage, opened: Opened) -> None:
        self.storage = storage
        self.path = storage.name
        self.root = opened.root
        self.spec = opened.root.spec
        self.layout = opened.root.layout
        record = opened.foundation or FoundationRecord({}, {})
        self.columns = Columns(storage, self.root, record.lengths, record.files)

    @functools.cached_property
    def sealed(self) -> dict[Part, tuple[bytes, ...]]:
        """What reading compares the files of every whole part with, in the order of its arrays.

        Hashes of shard indexes and of whole small files; kept as bytes, since a large cache has
        thousands of parts.
        """
        whole = whole_parts(self.storage, self.root, self.layout.parts)
        return {part: self._hashes(manifest) for part, manifest in whole.items()}

    def _hashes(self, manifest: Manifest) -> tuple[bytes, ...]:
        part = manifest.part
        keys = (a.key_of_part(part.number) for a in self.root.arrays[part.view].values())
        files = (manifest.files[key] for key in keys)
        return tuple(bytes.fromhex(f.index_sha256 or f.sha256) for f in files)

    @functools.cached_property
    def missing_parts(self) -> tuple[Part, ...]:
        """Parts that were never sealed or have lost a file."""
        return tuple(p for p in self.layout.parts if p not in self.sealed)

    def image_id(self, row: int) -> int:
        """COCO image id of a row."""
        return int(self.columns["images/image_id"][row])

    def file_name(self, row: int) -> str:
        """Name of a row's image, relative to the image folder; CacheError if it is no text."""
        first, last = self.columns.bounds("images/file_name_offset", "images/file_name_utf8", row)
        try:
            return bytes(self.columns["images/file_name_utf8"][first:last]).decode()
        except UnicodeDecodeError:
            raise CacheError(f"{self.path}: the file name of row {row} is no text") from None

    def original_hw(self, row: int) -> tuple[int, int]:
        """Annotated height and width of a row's image in pixels."""
        height, width = self.columns["images/original_hw"][row]
        return int(height), int(width)
