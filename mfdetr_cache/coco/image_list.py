"""The ``images`` and ``categories`` of a COCO document."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from mfdetr_cache.coco.box_forms import finite_number
from mfdetr_cache.coco.faults import Faults, Unusable, keys_of, short
from mfdetr_cache.coco.ids import SourceId, internal_ids, source_id
from mfdetr_cache.coco.image_files import (
    check_file_name,
    fault_of_name,
    files_by_stem,
    find_file,
    plain_stem,
    upright_size,
)
from mfdetr_cache.errors import DatasetError, ImageError
from mfdetr_cache.ops.masks import check_size

_SPELLED_OTHERWISE = (
    "file_name is spelled otherwise on disk ('/' for backslashes, %20, capitals, accents, or "
    "another ending)"
)
_BY_LAST_PART = "file_name is a path of another place, found by its last part"
_OF_URL = "file_name missing, taken from coco_url"
_OF_LVIS = ("neg_category_ids", "not_exhaustive_category_ids")
_FEDERATED = (
    "neg_category_ids, as in LVIS: other categories are not annotated everywhere, and COCO's AP "
    "counts what is found of them as wrong (LVIS's own does not)"
)
# V3Det has 13,204. COCO's measures take 200 kB for each of them.
_MOST_CATEGORIES = 20_000


@dataclass(frozen=True, slots=True)
class Category:
    """A COCO category.

    Its id is the annotation file's where that can be used, else its number from 1; ids may have
    gaps. ``written_id`` is its id in the annotation file, as the user knows it.
    """

    category_id: int
    name: str
    written_id: SourceId


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """An image as the annotation file lists it, by its name relative to the image folder.

    Ids are as those of :class:`Category`; the size is in pixels.
    """

    image_id: int
    file_name: str
    size_hw: tuple[int, int]
    written_id: SourceId

    def __str__(self) -> str:
        name = f" ({self.file_name})" if self.file_name else ""
        return f"image {self.written_id}{name}"


def read_categories(path: Path, raw: Sequence[Any]) -> dict[SourceId, Category]:
    """The categories of a document by their ids as written, in the order of the file.

    One without a name is called by its id. DatasetError if one has no id, two different ones share
    theirs, or there are too many.
    """
    if len(raw) > _MOST_CATEGORIES:
        raise DatasetError(
            f"annotation file {path} has {len(raw)} categories, the limit is {_MOST_CATEGORIES}"
        )
    names: dict[SourceId, str] = {}
    for number, category in enumerate(raw):
        written = source_id(category.get("id")) if isinstance(category, dict) else None
        if written is None:
            raise DatasetError(
                f"annotation file {path}: category {number} (counted from 0) lacks an 'id'; it is "
                f"{short(category)}"
            )
        name = category.get("name")
        text = f"category {written}" if name is None else str(name)
        text = text.encode(errors="replace").decode()
        if names.setdefault(written, text) != text:
            raise DatasetError(
                f"annotation file {path} has two categories of id {written}: "
                f"{names[written]!r} and {text!r}; give them different ids"
            )
    ids = internal_ids(list(names))
    return {
        written: Category(own, name, written)
        for (written, name), own in zip(names.items(), ids, strict=True)
    }


def read_images(
    path: Path, raw: Sequence[Any], folder: Path | None, faults: Faults, limit: int | None
) -> dict[SourceId, ImageEntry]:
    """The images of a document by their ids as written, in the order of the file.

    In their ``folder`` names are looked up, and sizes that lack are read; None does without both.
    ``faults`` takes down what cannot be used. DatasetError if an id is listed twice, or a file name
    leads out of the folder.
    """
    listed = _listed(path, raw, faults)
    found: dict[SourceId, ImageEntry] = {}
    taken: set[str] = set()
    names = _Names(folder, listed.values())
    for own, (written, image) in zip(internal_ids(list(listed)), listed.items(), strict=True):
        if limit is not None and len(found) == limit:
            break
        with faults:
            where = f"image {written}"
            name = image.get("file_name")
            if name is None and isinstance(url := image.get("coco_url"), str):  # as LVIS has it
                name = PurePosixPath(url).name
                faults.repair(where, _OF_URL)
            if isinstance(name, str):
                where += f" ({name})"
                name = names.on_disk(name, where, faults)
                check_file_name(name, f"annotation file {path}: image {written}")
            elif folder is None and name is None:
                name = ""  # nobody is going to open it
            else:
                what = f"is {short(name)}" if "file_name" in image else f"has {keys_of(image)}"
                raise Unusable(where, f"lacks a 'file_name' (it {what})")
            plain = str(PurePosixPath(name))
            if name and plain in taken:
                faults.notice(where, "file_name is that of another image too, so it counts twice")
            taken.add(plain)
            if any(image.get(key) is not None for key in _OF_LVIS):
                faults.notice(where, _FEDERATED)
            size = _size(image, where, name, folder, faults)
            found[written] = ImageEntry(own, name, size, written)
    return found


def _last_part(name: str) -> str:
    """The name of the file in a path, a URL, or a URL of Label Studio."""
    path, _, query = name.partition("?") if "/" in name else (name, "", "")
    if query.startswith("d="):  # /data/local-files/?d=photos%2Fa.png
        path = unquote(query[2:])
    return PurePosixPath(path.replace("\\", "/")).name


class _Names:
    """Names of the images that are listed, and of the files in their folder, if there is one."""

    def __init__(self, folder: Path | None, listed: Iterable[dict[str, Any]]) -> None:
        self._folder = folder
        self._listed = {n for image in listed if isinstance(n := image.get("file_name"), str)}
        self._there: dict[str, bool] = {}
        self._files: dict[PurePosixPath, dict[str, list[str]]] = {}
        lasts = {name: _last_part(name) for name in self._listed}
        counts = Counter(lasts.values())
        # Only where no other image has the same.
        self._last_parts = {
            n: last for n, last in lasts.items() if last not in ("", n) and counts[last] == 1
        }

    def on_disk(self, name: str, where: str, faults: Faults) -> str:
        """The name under which an image is in its folder, as it is spelled there.

        Its last part, where it cannot be used as it is and its last part can; else itself.
        """
        last = self._last_parts.get(name, "")
        if self._folder is None:  # nobody is going to open it
            return last if last and fault_of_name(name) else name
        if (there := self._find(self._folder, name)) is not None:
            if there != name:
                faults.repair(where, _SPELLED_OTHERWISE)
            return there
        if last and (there := self._find(self._folder, last)) is not None:
            faults.repair(where, _BY_LAST_PART)
            return there
        return name

    def _find(self, folder: Path, name: str) -> str | None:
        """The name of a file on disk; None if it is not there under any spelling."""
        if fault_of_name(name):
            return None
        if (there := find_file(folder, name)) is not None:
            return there
        path = PurePosixPath(name.replace("\\", "/"))
        if path.parent not in self._files:
            self._files[path.parent] = files_by_stem(folder / path.parent)
        names = self._files[path.parent].get(plain_stem(path), ())
        # Not the file of another image that is listed.
        alike = [n for f in names if (n := str(path.parent / f)) not in self._listed]
        found = [n for n in alike if PurePosixPath(n).suffix.lower() == path.suffix.lower()]
        # Beside photos of which some are gone, files with other endings are their masks.
        if not found and not self._has_any(folder, path.suffix):
            found = alike
        return found[0] if len(found) == 1 else None

    def _has_any(self, folder: Path, ending: str) -> bool:
        """Whether an image that is listed with an ending is there."""
        if ending not in self._there:
            own = (n for n in self._listed if PurePosixPath(n).suffix == ending)
            self._there[ending] = any(find_file(folder, n) is not None for n in own)
        return self._there[ending]


def _listed(path: Path, raw: Sequence[Any], faults: Faults) -> dict[SourceId, dict[str, Any]]:
    """The images that have an id, each once."""
    listed: dict[SourceId, dict[str, Any]] = {}
    for number, image in enumerate(raw):
        with faults:
            written = source_id(image.get("id")) if isinstance(image, dict) else None
            if written is None:
                raise Unusable(f"image {number} (counted from 0)", "lacks an 'id'")
            earlier = listed.setdefault(written, image)
            name, other = earlier.get("file_name"), image.get("file_name")
            if image is not earlier and name != other:  # NaN is not even itself
                raise DatasetError(
                    f"annotation file {path} lists an image id twice: {written} is "
                    f"{short(name)} and {short(other)}; give every image its own id"
                )
    return listed


def _size(
    image: dict[str, Any], where: str, name: str, folder: Path | None, faults: Faults
) -> tuple[int, int]:
    """Height and width as written, else as the file has them."""
    sides = [image.get(key) for key in ("height", "width")]
    height, width = (_whole(side) for side in sides)
    if height is not None and width is not None:
        try:
            return check_size((height, width))
        except ValueError as error:
            raise Unusable(where, f"is {error}") from error
    said = f"height {short(sides[0])} and width {short(sides[1])}"
    if folder is None:
        raise Unusable(where, f"has {said} in place of its size in pixels")
    try:
        size = upright_size(folder / name)
    except ImageError as error:
        raise Unusable(where, f"has {said}, and {error}") from error
    faults.repair(where, "height and width missing, taken from the file")
    return size


def _whole(value: object) -> int | None:
    """A side in pixels; None for what stands where it is not known: nothing, 0, -1."""
    number = finite_number(value)
    return int(number) if number is not None and number > 0 and number.is_integer() else None
