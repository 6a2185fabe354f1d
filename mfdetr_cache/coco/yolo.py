"""Datasets in YOLO's layout: a ``data.yaml``, and a text file of polygons beside every image."""

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from mfdetr_cache.coco.faults import short
from mfdetr_cache.coco.image_files import upright_size
from mfdetr_cache.coco.json_file import JsonFile
from mfdetr_cache.errors import DatasetError, ImageError
from mfdetr_cache.files import read_regular

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
_SPLITS = ("train", "val", "valid", "test")


def yolo_splits(path: Path) -> dict[str, Path]:
    """The splits of a ``data.yaml`` and their image folders, where these are there.

    None for a YAML file of something else; DatasetError if it is no YAML.
    """
    document = _read(path)
    if "names" not in document:
        return {}
    root = document.get("path")
    places = (path.parent / root, path.parent) if isinstance(root, str) else (path.parent,)
    images_of = {split: _folder(places, document.get(split)) for split in _SPLITS}
    return {split: folder for split, folder in images_of.items() if folder is not None}


def yolo_fault(path: Path) -> str:
    """What of the splits of a ``data.yaml`` cannot be read; empty for another YAML file too."""
    document = _read(path)
    named = [split for split in _SPLITS if document.get(split)]
    if "names" not in document:
        return f"{path} has no names of its classes" if named else ""
    lacking = [split for split in named if split not in yolo_splits(path)]
    if lacking:
        return f"{path}: {lacking[0]} is {short(document[lacking[0]])}, no folder that is there"
    return "" if named else f"{path} names no folder as train, val or test"


def _folder(places: tuple[Path, ...], value: object) -> Path | None:
    """The folder that a split names, below one of some places."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value:
        return None
    # Roboflow writes ../train/images beside the folder that it means; others where they had it,
    # such as /content/my/train/images. One part alone, as images, could be of all splits.
    parts = [part for part in PurePosixPath(value.replace("\\", "/")).parts if part not in "/.."]
    ends = ("/".join(parts[i:]) for i in range(len(parts) - 1))
    names = (value, value.removeprefix("../"), *ends)
    return next((f for place in places for name in names if (f := place / name).is_dir()), None)


def read_yolo(path: Path, images: Path) -> JsonFile:
    """A split in YOLO's layout as a COCO document.

    Args:
        path: Its ``data.yaml``.
        images: Its image folder; ``images`` in its path becomes ``labels`` for the polygons.

    Returns:
        The document: images in the order of their names with their size after EXIF rotation, one
        annotation per line of the text files. A line of a box alone has no mask.

    Raises:
        DatasetError: If names or folder are missing.
        ImageError: If an image is none.
    """
    names = _names(path)
    files = sorted(f for f in images.rglob("*") if f.suffix.lower() in _SUFFIXES)
    if not files:
        raise DatasetError(f"{images} has no image")
    parts = list(images.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    labels = Path(*parts)
    digest = hashlib.sha256(repr(sorted(names.items(), key=str)).encode())
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, file in enumerate(files, 1):
        name = file.relative_to(images)
        try:
            height, width = upright_size(file)
        except ImageError:
            height = width = 0  # told with all others that cannot be used
        entry = {"id": number, "file_name": name.as_posix(), "height": height, "width": width}
        listed.append(entry)
        text = labels / name.with_suffix(".txt")
        data = text.read_bytes() if text.is_file() else b""  # without: nothing in the image
        digest.update(name.as_posix().encode() + b"\0" + data + b"\0")
        for line, words in enumerate(data.decode("utf-8-sig", errors="replace").splitlines(), 1):
            if words.strip():
                where = f"{text.relative_to(labels)}:{line}"
                annotations.append({"id": where, "image_id": number, **_object(words, entry)})
    categories = [{"id": key, "name": name} for key, name in names.items()]
    document = {"images": listed, "annotations": annotations, "categories": categories}
    split = images.parent.name if images.name == "images" else images.name
    return JsonFile(document, split, digest.hexdigest())


def _names(path: Path) -> dict[int | str, str]:
    """The names of a ``data.yaml`` by their number."""
    names = _read(path).get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping) or not names:
        raise DatasetError(f"{path} has no list of names; is it the data.yaml of a dataset?")
    # A name that is a list of lists of aliases would be written out for hours.
    odd = next((name for name in names.values() if not isinstance(name, str)), None)
    if odd is not None:
        raise DatasetError(f"{path}: one of its names is {short(odd)}")
    return {int(k) if str(k).isdecimal() else str(k): name for k, name in names.items()}


def _object(line: str, image: Mapping[str, Any]) -> dict[str, Any]:
    """One line: a category and a polygon, or a box, in parts of the image's sides."""
    category, *words = line.split()
    width, height = image["width"], image["height"]
    try:
        values = [float(word) for word in words]
    except ValueError:
        return {"category_id": category, "segmentation": line}
    scaled = [v * (height if i % 2 else width) for i, v in enumerate(values)]
    if len(scaled) == 4:
        x, y, w, h = scaled
        return {"category_id": category, "bbox": [x - w / 2, y - h / 2, w, h]}
    return {"category_id": category, "segmentation": [scaled]}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        # Everything as text: a class called "no" is no truth value, and nothing is made of a tag.
        document = yaml.load(read_regular(path), yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, OSError, ValueError) as error:
        raise DatasetError(f"{path} is no YAML ({short(str(error))})") from error
    return document if isinstance(document, Mapping) else {}
