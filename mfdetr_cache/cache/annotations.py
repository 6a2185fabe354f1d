"""Annotations beside the features, as versions: the newest sealed one counts unless one is chosen.

A version holds the objects of every row in every view, the categories, and which label of the
detector stands for which. Features do not depend on it, so that better masks need no new
extraction; what a head learned from is named by the version's id.
"""

import contextlib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from mfdetr_cache.cache.columns import Columns
from mfdetr_cache.cache.crops import crop_columns, crop_lengths, read_crops
from mfdetr_cache.cache.document import read_document, read_sealed
from mfdetr_cache.cache.foundation import ANNOTATIONS, chunks_of_columns, metadata_keys
from mfdetr_cache.cache.manifest import require_files, require_names, status_key
from mfdetr_cache.cache.records import ColumnRecord, FileRecord
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.protocol import ROOT_KEY, Storage, explained
from mfdetr_cache.cache.zarr_nodes import write_column
from mfdetr_cache.errors import MEND, CacheError
from mfdetr_cache.fields import Fields
from mfdetr_cache.identity import Identity, identity_hash
from mfdetr_cache.ops.quantisation import StoredMap
from mfdetr_cache.sealed import seal
from mfdetr_cache.types import C1Crops, GroundTruth

SEALS = f"{status_key()}/annotations"
_SEAL = re.compile(re.escape(SEALS) + r"/(\d{6})\.json")
# By their name below a view the attribute of GroundTruth.
_OBJECT_COLUMNS = {
    "annotation_id": "annotation_ids",
    "category_id": "category_ids",
    "label": "labels",
    "box_xyxy": "boxes_xyxy",
    "area": "areas",
    "is_crowd": "is_crowd",
}


@dataclass(frozen=True)
class AnnotationHeader:
    """What a version of the annotations is, but for the objects, which follow from the source.

    Attributes:
        source: Name and SHA-256 of the annotation file, and how its categories were mapped.
        categories: ``{"id", "name"}`` of each of the dataset's.
        label_categories: Category id of each detector label, -1 for none.
    """

    source: Identity
    categories: list[dict[str, Any]]
    label_categories: tuple[int, ...]

    @property
    def annotations_id(self) -> str:
        """What names these labels, whatever cache they are in."""
        return identity_hash(self.header)

    @property
    def header(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "source": self.source,
            "categories": self.categories,
            "label_categories": list(self.label_categories),
        }

    def is_of(self, other: "AnnotationHeader") -> bool:
        """Whether these are the same labels, whatever their files were called."""
        ours, theirs = (
            {**header.header, "source": {**header.source, "name": None}} for header in (self, other)
        )
        return ours == theirs


@dataclass(frozen=True)
class AnnotationContent(AnnotationHeader):
    """A version of the annotations, before it is written: objects of each row, by view.

    Objects are in pixels of the view's image. ``crops`` of C1, by view and row, are those that
    the features lack.
    """

    objects: dict[str, list[GroundTruth]]
    crops: dict[str, dict[int, C1Crops]] = field(default_factory=dict)


@dataclass(frozen=True)
class AnnotationRecord(AnnotationHeader):
    """What the sealed document of a version says."""

    number: int
    columns: ColumnRecord


def seal_key(number: int) -> str:
    """Where the sealed document of a version is."""
    return f"{SEALS}/{number:06d}.json"


def folder_of(number: int) -> str:
    """Path of a version's group."""
    return f"{ANNOTATIONS}/{number:06d}"


def version_numbers(storage: Storage) -> tuple[int, ...]:
    """Numbers of the sealed versions of the annotations, rising."""
    matches = (_SEAL.fullmatch(key) for key in storage.sizes(SEALS))
    return tuple(sorted(int(m[1]) for m in matches if m))


def newest_version(storage: Storage) -> int:
    """The version that is read where none is chosen; CacheError if there is none."""
    numbers = version_numbers(storage)
    if not numbers:
        raise CacheError(f"{storage.name}/{SEALS} holds no sealed annotations; {MEND}")
    return numbers[-1]


def write_annotations(
    storage: Storage, root: Root, number: int, content: AnnotationContent
) -> None:
    """Write a version; it counts once its sealed document is there.

    What a killed writing left of it is replaced.
    """
    folder = folder_of(number)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, explained(storage):
        local = LocalStorage(Path(temporary))
        group = zarr.create_group(store=temporary)
        group.create_group(folder, attributes=content.header)
        lengths: dict[str, int] = {}
        for view, objects in content.objects.items():
            columns = _object_columns(objects)
            if root.layout.c1_roi is not None:
                columns |= crop_columns(root, content.crops.get(view, {}))
            for name, values in columns.items():
                path = f"{folder}/views/{view}/{name}"
                write_column(group, path, root.column(path), values)
                lengths[path] = len(values)
        keys = local.sizes(folder)
        for key in set(storage.sizes(folder)) - set(keys):
            storage.delete(key)
        files: dict[str, FileRecord] = {}
        for key in keys:
            data = local.read(key)
            files[key] = FileRecord.of(data)
            storage.write(key, [data])
        document = {
            **root.names,
            **content.header,
            "number": number,
            "annotations_id": content.annotations_id,
            **ColumnRecord(lengths, files).plain,
        }
        storage.write(seal_key(number), [seal(document)])


def _object_columns(per_row: list[GroundTruth]) -> dict[str, NDArray[Any]]:
    """The arrays of a view, by name."""
    runs = [r for g in per_row for r in g.run_lengths]
    columns = {
        name: np.concatenate([getattr(g, attribute) for g in per_row])
        for name, attribute in _OBJECT_COLUMNS.items()
    }
    columns["offset"] = np.cumsum([0, *(len(g) for g in per_row)], dtype=np.int64)
    columns["run_length_offset"] = np.cumsum([0, *(len(r) for r in runs)], dtype=np.int64)
    columns["run_length"] = np.concatenate(runs) if runs else np.zeros(0, np.uint32)
    return columns


def read_annotations(storage: Storage, root: Root, number: int) -> AnnotationRecord:
    """The sealed document of a version.

    CacheError if it is missing, damaged, or of another version or cache.
    """
    key = seal_key(number)
    where = f"{storage.name}/{key}"
    try:
        fields = read_sealed(storage, key)
    except FileNotFoundError:
        known = ", ".join(map(str, version_numbers(storage))) or "none"
        raise CacheError(
            f"{storage.name} has no annotations {number}; there are: {known}"
        ) from None
    require_names(fields, root, where)
    if fields["number"] != number:
        raise CacheError(f"{where} is of version {fields['number']!r}; {MEND}")
    header = _header(fields, root)
    if fields["annotations_id"] != header.annotations_id:
        raise CacheError(f"{where} has an annotations_id that is not that of its content; {MEND}")
    record = ColumnRecord.of(fields)
    _require_lengths(record.lengths, root, number, where)
    metadata = metadata_keys(record.lengths, folder_of(number))
    require_files(record.files, [*metadata, *chunks_of_columns(root, record.lengths)], where)
    return AnnotationRecord(**vars(header), number=number, columns=record)


def header_of(storage: Storage, root: Root, number: int) -> AnnotationHeader | None:
    """What a version is of, although it may be damaged; None if that cannot be read.

    It stands in the sealed document and in the group.
    """
    with contextlib.suppress(CacheError, FileNotFoundError):
        return _header(read_sealed(storage, seal_key(number)), root)
    with contextlib.suppress(CacheError, FileNotFoundError):
        group = read_document(storage, f"{folder_of(number)}/{ROOT_KEY}")
        return _header(group.fields("attributes"), root)
    return None


def _header(fields: Fields, root: Root) -> AnnotationHeader:
    source = fields.fields("source")
    source.text("name")
    source.text("sha256")
    categories = [
        {**c.values, "id": c.integer("id", -(2**63), 2**63 - 1), "name": c.text("name")}
        for c in fields.each("categories")
    ]
    known = {-1, *(c["id"] for c in categories)}
    labels = fields.integers("label_categories", -(2**63), 2**63 - 1)
    if len(labels) != root.spec.num_labels or not known.issuperset(labels):
        raise CacheError(f"{fields.where}: label_categories do not fit detector and categories")
    return AnnotationHeader(dict(source.values), categories, labels)


def _require_lengths(lengths: Mapping[str, int], root: Root, number: int, where: str) -> None:
    """Refuse columns that are missing, too many, or of lengths that do not belong together."""
    expected: dict[str, int] = {}
    for view in root.layout.views:
        base = f"{folder_of(number)}/views/{view}"
        objects = lengths.get(f"{base}/label", 0)
        expected |= {f"{base}/{name}": objects for name in _OBJECT_COLUMNS}
        expected[f"{base}/offset"] = root.layout.num_rows + 1
        expected[f"{base}/run_length_offset"] = objects + 1
        expected[f"{base}/run_length"] = lengths.get(f"{base}/run_length", 0)
        if root.layout.c1_roi is not None:
            rows = lengths.get(f"{base}/crop_row", 0)
            crops = lengths.get(f"{base}/crop_query", 0)
            expected |= crop_lengths(root, base, rows, crops)
    if lengths != expected:
        raise CacheError(f"{where} does not name the columns of its rows; {MEND}")


class Annotations:
    """A version of the annotations of a cache, by view and row."""

    def __init__(self, storage: Storage, root: Root, record: AnnotationRecord) -> None:
        self.record = record
        self._path = storage.name
        self._root = root
        self._columns = Columns(storage, root, record.columns)

    def objects(self, view: str, row: int, size_hw: tuple[int, int]) -> GroundTruth:
        """The annotated objects of a row, in pixels of the view's image of that size.

        CacheError if a column is damaged, or holds what no object can have.
        """
        base = f"{folder_of(self.record.number)}/views/{view}"
        columns = self._columns
        first, last = columns.bounds(f"{base}/offset", f"{base}/label", row)
        runs: tuple[NDArray[np.uint32], ...] = ()
        if last > first:
            offsets, flat = f"{base}/run_length_offset", f"{base}/run_length"
            start = columns.bounds(offsets, flat, first)[0]
            stop = columns.bounds(offsets, flat, last - 1)[1]
            # By slice: the run lengths of a whole dataset need not fit in memory.
            cuts = columns[offsets][first + 1 : last] - start
            held = columns.slice(flat, start, stop).astype(np.uint32)
            runs = tuple(np.split(held, cuts.tolist()))
        values = {
            attribute: columns[f"{base}/{name}"][first:last]
            for name, attribute in _OBJECT_COLUMNS.items()
        }
        values["is_crowd"] = values["is_crowd"].astype(np.bool_)
        labels, pixels = values["labels"], size_hw[0] * size_hw[1]
        # An object without a mask has no runs.
        fits = all(not len(r) or int(r.sum(dtype=np.int64)) == pixels for r in runs)
        if not fits or ((labels < -1) | (labels >= self._root.spec.num_labels)).any():
            raise CacheError(
                f"{self._path}: annotations {self.record.number} of row {row} of view {view} hold "
                f"what no object can have; {MEND}"
            )
        return GroundTruth(run_lengths=runs, **values)

    def crops(self, view: str, row: int) -> tuple[NDArray[np.int64], StoredMap] | None:
        """Query of each crop of C1, rising, and the crops, all that the row needs.

        They came with these annotations; None where those of the features will do.
        """
        if self._root.layout.c1_roi is None:
            return None
        base = f"{folder_of(self.record.number)}/views/{view}"
        return read_crops(self._columns, self._root, base, row)
