"""Sealed documents of a cache: one manifest per part, the foundation, versions of annotations.

Each names the cache, what it seals, and exactly its set of files with their sizes and hashes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mfdetr_cache.cache.document import read_sealed
from mfdetr_cache.cache.records import FileRecord, files_of, plain_files
from mfdetr_cache.cache.root import Root
from mfdetr_cache.cache.schema import BASE_VIEW, Part
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import MEND, CacheError
from mfdetr_cache.fields import Fields
from mfdetr_cache.sealed import seal


def status_key(view: str = BASE_VIEW) -> str:
    """Prefix of a view's status array, where its manifests are; the writer's lock is in base's.

    Zarr readers that list a group do not look inside arrays, so files of ours that are no Zarr
    nodes disturb nobody there.
    """
    return f"views/{view}/status"


# What was measured about a cache's preset.
CERTIFICATES_KEY = f"{status_key()}/certificates"


def manifest_key(part: Part) -> str:
    """Where the manifest of a part is."""
    return f"{status_key(part.view)}/manifest/{part.number:06d}.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a sealed part is.

    Attributes:
        skipped: Row, image id and reason of images that were left out.
        files: Its files by key.
        image_bytes: Size of the image file of each row when it was read; 0 where it is not known.
    """

    part: Part
    skipped: tuple[dict[str, Any], ...]
    files: dict[str, FileRecord]
    image_bytes: tuple[int, ...]


def write_manifest(storage: Storage, root: Root, manifest: Manifest) -> None:
    """Seal a part whose files are all there."""
    rows = root.layout.rows_of_part(manifest.part.number)
    document = {
        **root.names,
        "view": manifest.part.view,
        "part": manifest.part.number,
        "rows": [rows.start, rows.stop],
        "skipped": list(manifest.skipped),
        "image_bytes": list(manifest.image_bytes),
        "files": plain_files(manifest.files),
    }
    storage.write(manifest_key(manifest.part), [seal(document)])


def read_manifest(storage: Storage, root: Root, part: Part) -> Manifest | None:
    """The manifest of a part; None if the part was never sealed.

    CacheError if it is damaged, or that of another part or cache.
    """
    key = manifest_key(part)
    try:
        fields = read_sealed(storage, key)
    except FileNotFoundError:
        return None
    where = f"{storage.name}/{key}"
    require_names(fields, root, where)
    rows = root.layout.rows_of_part(part.number)
    expected = {"view": part.view, "part": part.number, "rows": [rows.start, rows.stop]}
    for name, value in expected.items():
        if fields[name] != value:
            raise CacheError(f"{where} is of {name} {fields[name]} and not {value}; {MEND}")
    files = files_of(fields)
    keys = [a.key_of_part(part.number) for a in root.arrays[part.view].values()]
    require_files(files, keys, where)
    skipped = tuple(
        {
            "row": s.integer("row", rows.start, rows.stop - 1),
            "image_id": s.integer("image_id", -(2**63), 2**63 - 1),
            "reason": s.text("reason"),
        }
        for s in fields.each("skipped")
    )
    # Release 0.1.0 did not write them.
    is_known = "image_bytes" in fields.values
    image_bytes = fields.integers("image_bytes", 0, 2**53) if is_known else (0,) * len(rows)
    if len(image_bytes) != len(rows):
        raise CacheError(f"{where} has image_bytes of {len(image_bytes)} rows; {MEND}")
    return Manifest(part, skipped, files, image_bytes)


def sizes_of_images(root: Root, manifests: Mapping[Part, Manifest]) -> list[tuple[int, int]]:
    """Rows of sealed parts with the size in bytes of their image file, where it is known."""
    return [
        (row, size)
        for part, manifest in manifests.items()
        for row, size in zip(
            root.layout.rows_of_part(part.number), manifest.image_bytes, strict=True
        )
        if size
    ]


def require_names(fields: Fields, root: Root, where: str) -> None:
    """Refuse a sealed document of another cache; the CacheError names what it is of."""
    for name, value in root.names.items():
        if fields[name] != value:
            raise CacheError(f"{where} is of {name} {fields[name]!r} and not {value!r}; {MEND}")


def require_files(files: Mapping[str, FileRecord], keys: Iterable[str], where: str) -> None:
    """Refuse a sealed document that does not name exactly the files it seals.

    The CacheError names a file that is missing or too much.
    """
    wrong = sorted(set(files) ^ set(keys))
    if wrong:
        what = "names" if wrong[0] in files else "does not name"
        raise CacheError(f"{where} {what} {wrong[0][:200]!r}; {MEND}")


def whole_parts(storage: Storage, root: Root, parts: Iterable[Part]) -> dict[Part, Manifest]:
    """Those of some parts that are sealed and whose files have the size they were sealed with.

    CacheError if a manifest is damaged.
    """
    # Of an object store one listing in place of a question per file.
    listed = None if storage.folder is not None else storage.sizes("views")
    size = storage.size if listed is None else listed.get
    whole = {}
    for part in parts:
        is_there = listed is None or manifest_key(part) in listed
        manifest = read_manifest(storage, root, part) if is_there else None
        if manifest and all(size(k) == f.num_bytes for k, f in manifest.files.items()):
            whole[part] = manifest
    return whole
