"""Datasets in YOLO's layout: a ``data.yaml``, and a text file of polygons beside every image."""

import codecs
import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from mfdetr_cache.coco.faults import short
from mfdetr_cache.coco.image_files import IMAGE_SUFFIXES, upright_size
from mfdetr_cache.coco.json_file import JsonFile
from mfdetr_cache.coco.layouts import yaml_and_split
from mfdetr_cache.errors import DatasetError, ImageError
from mfdetr_cache.files import read_regular

_SPLITS = ("train", "val", "valid", "test")
# Objects at the border are drawn a little over it; what is farther is in another unit.
_FARTHEST = 2


class DataYaml:
    """A ``data.yaml``; its folders may lie in any of ``places``. DatasetError if it is no YAML."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document = _read(path)
        root = self.document.get("path")
        self.places = (path.parent / root, path.parent) if isinstance(root, str) else (path.parent,)

    def folders(self) -> dict[str, Path]:
        """The folder of the images of each split, where these are there; none for another YAML."""
        if "names" not in self.document:
            return {}
        found = {split: self.folder_of(self.sources(split)) for split in _SPLITS}
        return {split: folder for split, folder in found.items() if folder is not None}

    def fault(self) -> str:
        """What of the splits cannot be read; empty for another YAML file too."""
        named = [split for split in _SPLITS if self.document.get(split)]
        if "names" not in self.document:
            return f"{self.path} has no names of its classes" if named else ""
        folders = self.folders()
        if lacking := [split for split in named if split not in folders]:
            return self.fault_of(lacking[0])
        return "" if named else f"{self.path} names no folder as train, val or test"

    def fault_of(self, split: str) -> str:
        """Why a split has no images."""
        if not self.document.get(split):
            return f"{self.path} names no {split}"
        said = f"{self.path}: {split} is {short(self.document[split])}"
        if sources := self.sources(split):
            return f"{said}, and no image of {sources[0]} is there"
        return f"{said}, no folder or list of images that is there"

    def sources(self, split: str) -> list[Path]:
        """The folders and text files of a split; none unless all are there."""
        value = self.document.get(split)
        found = [self._source(v) for v in (value if isinstance(value, list) else [value])]
        return [source for source in found if source is not None] if all(found) else []

    def _source(self, value: object) -> Path | None:
        """A folder, or a text file, below one of the places."""
        if not isinstance(value, str) or not value:
            return None
        # Roboflow writes ../train/images beside the folder that it means; others where they had it.
        names = [value, value.removeprefix("../"), *_ends(value)]
        if is_list := value.lower().endswith(".txt"):
            names.append(PurePosixPath(value).name)
        files = (place / name for place in self.places for name in names)
        return next((f for f in files if f.is_dir() or (is_list and f.is_file())), None)

    def folder_of(self, sources: Sequence[Path]) -> Path | None:
        """The folder that the images of a split have in common; None if none is there."""
        if len(sources) == 1 and sources[0].is_dir():
            return sources[0]
        parents = {file.parent for file in self.images_of(sources) if file.is_absolute()}
        return Path(os.path.commonpath(parents)) if parents else None

    def images_of(self, sources: Sequence[Path]) -> list[Path]:
        """The images of folders by name, and those of text files in order, as absolute paths.

        One that is not there stays relative.
        """
        files: list[Path] = []
        for source in sources:
            if source.is_dir():
                files += sorted(f for f in source.absolute().rglob("*") if is_image(f))
                continue
            try:
                text = os.fsdecode(read_regular(source).removeprefix(codecs.BOM_UTF8))
            except OSError as error:
                raise DatasetError(f"{source} cannot be read: {error.strerror}") from error
            here = [place.absolute() for place in (source.parent, *self.places)]
            files += [_image_of(line.strip(), here) for line in text.split("\n") if line.strip()]
        return files

    def names(self) -> dict[int | str, str]:
        """The names of the classes by their number; DatasetError if they are none."""
        names = self.document.get("names")
        if isinstance(names, list):
            names = dict(enumerate(names))
        if not isinstance(names, Mapping) or not names:
            raise DatasetError(
                f"{self.path} has no list of names; is it the data.yaml of a dataset?"
            )
        # A name that is a list of lists of aliases would be written out for hours.
        odd = next((name for name in names.values() if not isinstance(name, str)), None)
        if odd is not None:
            raise DatasetError(f"{self.path}: one of its names is {short(odd)}")
        return {int(k) if str(k).isdecimal() else str(k): name for k, name in names.items()}


def _ends(value: str) -> Iterator[str]:
    """What a path of another machine, such as /content/my/train/images, may be called here."""
    parts = [part for part in PurePosixPath(value.replace("\\", "/")).parts if part not in "/.."]
    # One part alone, as images, could be of all splits.
    return ("/".join(parts[i:]) for i in range(len(parts) - 1))


def is_image(file: Path) -> bool:
    """Whether a file is called as images are."""
    # A name that begins with a dot is a note of macOS beside a file, or of another program.
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")


def _image_of(line: str, places: Sequence[Path]) -> Path:
    """The file that a line of a text file means; a relative path if it is not there."""
    names = (line, *_ends(line))
    files = (os.path.normpath(place / name) for place in places for name in names)
    lacking = line.replace("\\", "/").lstrip("./")
    return Path(next((f for f in files if os.path.isfile(f)), lacking))  # noqa: PTH113


def read_yolo(path: Path, images: Path | None) -> JsonFile:
    """A split in YOLO's layout as a COCO document; DatasetError if names or images are missing.

    Of a ``data.yaml``, perhaps with the split behind its name: ``data.yaml:train``; ``images`` is
    the image folder, where no split is named. Images are in the order of their names, or of the
    text file that lists them, with their size after EXIF rotation; one that cannot be read has
    size 0. There is one annotation per line of their text files; a line of a box alone has no mask.
    """
    path, split = yaml_and_split(path)
    yaml_file = DataYaml(path)
    names = yaml_file.names()
    sources = [images] if images and not split else yaml_file.sources(split)
    if not sources and split:
        raise DatasetError(yaml_file.fault_of(split))
    if not sources:
        raise DatasetError(
            f"{path} is a dataset in YOLO's layout: its images are needed too, or the split behind "
            f"its name, as in {path.name}:train"
        )
    files, folder = yaml_file.images_of(sources), yaml_file.folder_of(sources)
    if not files or folder is None:
        raise DatasetError(f"{sources[0]} has no image")
    digest = hashlib.sha256(repr(sorted(names.items(), key=str)).encode())
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    texts = [_labels_of(file) for file in files]
    if not any(text.is_file() for text in texts):
        raise DatasetError(
            f"no image of {sources[0]} has a text file of polygons; the first was looked for at "
            f"{texts[0]}"
        )
    for number, (file, text) in enumerate(zip(files, texts, strict=True), 1):
        is_there = file.is_absolute()
        name = os.path.relpath(file, folder) if is_there else str(file)
        entry = {"id": number, "file_name": name, "height": 0, "width": 0}
        with contextlib.suppress(ImageError):  # told with all others that cannot be used
            entry["height"], entry["width"] = upright_size(file) if is_there else (0, 0)
        listed.append(entry)
        # Without one there is nothing in the image.
        data = text.read_bytes() if is_there and text.is_file() else b""
        digest.update(name.encode(errors="surrogateescape") + b"\0" + data + b"\0")
        for line, words in enumerate(data.decode("utf-8-sig", errors="replace").splitlines(), 1):
            if words.strip():
                where = f"{PurePosixPath(name).with_suffix(text.suffix)}:{line}"
                annotations.append({"id": where, "image_id": number, **_object(words, entry)})
    categories = [{"id": key, "name": name} for key, name in names.items()]
    made = {"images": listed, "annotations": annotations, "categories": categories}
    if len(sources) > 1 or not sources[0].is_dir():
        return JsonFile(made, split, digest.hexdigest())
    name = folder.parent.name if folder.name == "images" else folder.name
    return JsonFile(made, name, digest.hexdigest())


def _labels_of(image: Path) -> Path:
    """The text file of an image's polygons: ``images`` in its path is ``labels`` there."""
    parts = list(image.parent.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    plain, capitals = (Path(*parts, image.stem + ending) for ending in (".txt", ".TXT"))
    return capitals if capitals.is_file() and not plain.is_file() else plain


def _object(line: str, image: Mapping[str, Any]) -> dict[str, Any]:
    """One line: a category and a polygon, or a box, in parts of the image's sides."""
    category, *words = line.replace(",", " ").split()
    width, height = image["width"], image["height"]
    try:
        values = [float(word) for word in words]
    except ValueError as error:
        return {"category_id": category, "segmentation": error}
    if fault := _fault_of_numbers(values):
        return {"category_id": category, "segmentation": ValueError(fault)}
    scaled = [v * (height if i % 2 else width) for i, v in enumerate(values)]
    if len(scaled) == 4:
        x, y, w, h = scaled
        return {"category_id": category, "bbox": [x - w / 2, y - h / 2, w, h]}
    return {"category_id": category, "segmentation": [scaled]}


def _fault_of_numbers(values: Sequence[float]) -> str:
    """What is wrong with the numbers of a line as a whole; empty if nothing is."""
    if values and len(values) != 4 and (len(values) % 2 or len(values) < 6):
        return (
            f"{len(values)} numbers behind the class: x, y of three points or more, or x, y, "
            "width, height, have another number"
        )
    if any(abs(v) > _FARTHEST for v in values):
        return (
            f"{max(values, key=abs):g} is no part of the image's sides, which are from 0 to 1; in "
            "pixels they are not YOLO's"
        )
    return ""


def _read(path: Path) -> Mapping[str, Any]:
    try:
        # Everything as text: a class called "no" is no truth value, and nothing is made of a tag.
        document = yaml.load(read_regular(path), yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DatasetError(f"{path} is no YAML ({error.problem}{line})") from error
    except (yaml.YAMLError, RecursionError, OSError, ValueError) as error:
        raise DatasetError(f"{path} is no YAML ({short(str(error))})") from error
    return document if isinstance(document, Mapping) else {}
