"""What is written when a cache is created: its root, its images, how each view's image is made."""

import contextlib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mfdetr_cache.cache.arrays import chunk_keys, image_columns
from mfdetr_cache.cache.columns import Columns
from mfdetr_cache.cache.document import read_document, read_sealed
from mfdetr_cache.cache.manifest import (
    require_files,
    require_names,
    status_key,
    whole_parts,
)
from mfdetr_cache.cache.records import ColumnRecord
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
class Opened:
    """A root and its foundation as far as they are whole.

    Attributes:
        root: What the cache is.
        foundation: What was written at creation, but annotations; nothing where its document is
            missing or damaged.
        faults: A line if one of the two is damaged or contradicts the other.
    """

    root: Root
    foundation: ColumnRecord
    faults: tuple[str, ...]


def seal_foundation(storage: Storage, root: Root, record: ColumnRecord) -> None:
    """Write the foundation's document."""
    document = {**root.names, "root": root.attributes, **record.plain}
    storage.write(FOUNDATION_KEY, [seal(document)])


def read_opened(storage: Storage) -> Opened:
    """Root and foundation, each compared with the other.

    The root is the foundation's copy where its own is damaged. CacheError if there is no cache,
    this version does not read it, or both are damaged.
    """
    if storage.folder is not None and not storage.folder.exists():
        raise CacheError(f"cache {storage.name} does not exist; make it with: mfdetr extract")
    attributes = _root_attributes(storage)
    try:
        kept, foundation = _read_foundation(storage)
        if _is_foreign(storage, kept, attributes):
            raise CacheError(f"{storage.name}/{FOUNDATION_KEY} is of another cache; {MEND}")
    except FileNotFoundError:
        fault = f"{storage.name}/{FOUNDATION_KEY} is missing; {MEND}"
    except CacheError as error:
        if attributes is None and isinstance(error.__cause__, OSError):
            raise  # such as a folder that may not be read
        fault = str(error)
    else:
        if attributes and attributes.values != kept.attributes and storage.forget(ROOT_KEY):
            attributes = _root_attributes(storage)
        if attributes is not None and attributes.values == kept.attributes:
            return Opened(kept, foundation, ())
        fault = f"{storage.name}/{ROOT_KEY} is not what the cache was created with; {MEND}"
        return Opened(kept, foundation, (fault,))
    if attributes is None:
        raise CacheError(f"{storage.name} is no feature cache (no {ATTRIBUTES_KEY} attributes)")
    return Opened(Root.from_fields(attributes), ColumnRecord({}, {}), (fault,))


def read_root(storage: Storage) -> Root:
    """What a cache is; CacheError as :func:`read_opened`, or if either of the two is damaged."""
    opened = read_opened(storage)
    if opened.faults:
        raise CacheError(opened.faults[0])
    return opened.root


def _root_attributes(storage: Storage) -> Fields | None:
    """Attributes of the root, if there are any."""
    with contextlib.suppress(FileNotFoundError, CacheError):
        attributes = read_document(storage, ROOT_KEY).fields("attributes").fields(ATTRIBUTES_KEY)
        return Fields(attributes.values, storage.name, CacheError)
    return None


def _is_foreign(storage: Storage, kept: Root, attributes: Fields | None) -> bool:
    """Whether the foundation, and not the root, is another cache's: annotations name theirs."""
    theirs = None if attributes is None else attributes.values.get("cache_id")
    if theirs is None or theirs == kept.cache_id:
        return False
    with contextlib.suppress(FileNotFoundError, CacheError):
        return bool(read_sealed(storage, FIRST_ANNOTATIONS_KEY)["cache_id"] == theirs)
    return False


def _read_foundation(storage: Storage) -> tuple[Root, ColumnRecord]:
    fields = read_sealed(storage, FOUNDATION_KEY)
    where = f"{storage.name}/{FOUNDATION_KEY}"
    root = Root.from_fields(fields.fields("root"))
    require_names(fields, root, where)
    record, expected = ColumnRecord.of(fields), image_columns(root.layout)
    if set(record.lengths) != set(expected):
        raise CacheError(f"{where} does not name the columns of its layout; {MEND}")
    for path, length in expected.items():
        if length is not None and record.lengths[path] != length:
            raise CacheError(
                f"{where} has {record.lengths[path]} of {path} and not {length}; {MEND}"
            )
    arrays = [a.path for view in root.arrays.values() for a in view.values()]
    metadata = [*metadata_keys([*arrays, *record.lengths], ""), f"{ANNOTATIONS}/{ROOT_KEY}"]
    require_files(record.files, [*metadata, *chunks_of_columns(root, record.lengths)], where)
    return root, record


def chunks_of_columns(root: Root, lengths: Mapping[str, int]) -> list[str]:
    """Keys of the chunks of columns, whose lengths are given by path."""
    return [k for path, n in lengths.items() for k in chunk_keys(path, root.column(path), n)]


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
        path: Name of its storage, for messages.
        spec: The detector it was made with.
        columns: Ids, names and transforms.
    """

    def __init__(self, storage: Storage, opened: Opened) -> None:
        self.storage = storage
        self.path = storage.name
        self.root = opened.root
        self.spec = opened.root.spec
        self.layout = opened.root.layout
        self.columns = Columns(storage, self.root, opened.foundation)

    @functools.cached_property
    def sealed(self) -> dict[Part, tuple[bytes, ...]]:
        """What reading compares the files of every whole part with, in the order of its arrays.

        Hashes of shard indexes and of whole small files; kept as bytes, since a large cache has
        thousands of parts.
        """
        sealed = {}
        for part, manifest in whole_parts(self.storage, self.root, self.layout.parts).items():
            keys = (a.key_of_part(part.number) for a in self.root.arrays[part.view].values())
            files = (manifest.files[key] for key in keys)
            sealed[part] = tuple(bytes.fromhex(f.index_sha256 or f.sha256) for f in files)
        return sealed

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
