"""Where images and annotations of a split lie, in the layouts that tools export."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mfdetr_cache.coco.formats import told_of_format
from mfdetr_cache.coco.json_file import read_json
from mfdetr_cache.errors import ConfigError, DatasetError
from mfdetr_cache.options import Option, existing_file

_ROBOFLOW = "_annotations.coco.json"
# Names of files of a whole dataset, as Label Studio, FiftyOne and labelme2coco export it.
_WHOLE = {"", "result", "labels", "dataset", "annotations"}
# Files that COCO has beside its instances.
_OTHER_KINDS = ("captions", "image_info", "panoptic", "person_keypoints", "stuff")
# Names of one split in different tools.
_SAME = ({"val", "valid", "validation"}, {"train", "training"}, {"test", "testing"})


@dataclass(frozen=True, slots=True)
class DatasetFiles:
    """Image folder of a split, and its COCO instances JSON.

    In YOLO's layout that is its ``data.yaml``, with the split behind it: ``data.yaml:train``.
    """

    images: Path
    annotations: Path


def yaml_and_split(path: Path) -> tuple[Path, str]:
    """A ``data.yaml`` and the split that stands behind its name; empty where none does.

    Examples:
        >>> [str(part) for part in yaml_and_split(Path("a/data.yaml:train"))]
        ['a/data.yaml', 'train']
    """
    named = re.fullmatch(r"(?s)(.+\.ya?ml):(\w+)", path.name)
    return (path.with_name(named[1]), named[2]) if named else (path, "")


def existing_annotations(text: str) -> Path:
    """An annotation file that must be there; a ``data.yaml`` may have a split behind its name."""
    existing_file(str(yaml_and_split(Path(text))[0]))
    return Path(text)


ANNOTATIONS = Option(metavar="FILE", parse=existing_annotations)


def dataset_files(
    images: Path | None, annotations: Path | None, dataset: Path | None, split: str | None
) -> DatasetFiles:
    """The files that a user named, or that are found in a dataset's folder.

    ConfigError if neither both files nor a folder are named, DatasetError if it has no such
    split.
    """
    if dataset is not None and images is None and annotations is None:
        return find_split(dataset, split)
    if dataset is not None or split is not None:
        raise ConfigError("--dataset FOLDER --split NAME stand in place of --images, --annotations")
    if images is None or annotations is None:
        raise ConfigError("give --images and --annotations, or --dataset with its --split")
    return DatasetFiles(images, annotations)


def find_split(folder: Path, split: str | None) -> DatasetFiles:
    """A split of a dataset in COCO's, Roboflow's or YOLO's layout; None takes the only one.

    DatasetError, naming the splits there are, if it is none of them.
    """
    splits = _splits(folder)
    if not splits:
        raise DatasetError(
            f"--dataset {folder} has no split in a layout that is known: COCO "
            f"(annotations/instances_*.json), Roboflow (train/{_ROBOFLOW}) or YOLO (data.yaml)"
            f"{_instead(folder)}{_faults(folder)}"
        )
    if split in splits:
        return splits[split]
    meant = [files for name, files in splits.items() if split is None or _is_meant(name, split)]
    if len(meant) != 1:
        lacking = "give --split" if split is None else f"has no split {split!r}"
        raise DatasetError(
            f"--dataset {folder} {lacking}; it has {', '.join(sorted(splits))}{_faults(folder)}"
        )
    return meant[0]


def _faults(folder: Path) -> str:
    """What is wrong with the YAML files of a folder, behind a message."""
    from mfdetr_cache.coco.yolo import DataYaml

    faults = [fault for path in sorted(folder.glob("*.y*ml")) if (fault := DataYaml(path).fault())]
    return f"; {faults[0]}" if faults else ""


def _instead(folder: Path) -> str:
    """What a folder without a split has instead, behind a message."""
    for inner in sorted(folder.glob("*/")):
        if splits := _splits(inner):
            return f"; {inner} has {', '.join(sorted(splits))}"
    for pattern in ("*.json", "*/*.json", "*/*/*.json"):
        if path := next(iter(sorted(folder.glob(pattern))), None):
            with suppress(DatasetError):
                if told := told_of_format(read_json(path, "file", "").document):
                    return f"; {path} {told}"
    return "; put it in one of these, or use extract with --images and --annotations"


def split_to_measure(folder: Path) -> str | None:
    """The split of a dataset that is there for measuring, ``val`` before ``test``; or None."""
    names = sorted(_splits(folder))
    meant = (n for split in ("val", "test") for n in names if _is_meant(n, split))
    return next(meant, None)


def _is_meant(name: str, split: str) -> bool:
    """Whether a split is called so by another tool, or with a year behind it."""
    name, split = name.lower(), split.lower()
    same = next((names for names in _SAME if split in names), {split})
    return any(name == other or name.rstrip("0123456789") == other for other in same)


def _splits(folder: Path) -> dict[str, DatasetFiles]:
    """Every split with its files; of one in several layouts, the last is taken."""
    found = dict(_of_layouts(folder))
    return {**_of_other_names(folder, set(found)), **found}


def _of_layouts(folder: Path) -> Iterator[tuple[str, DatasetFiles]]:
    """Splits in the layouts of COCO, Roboflow and YOLO, and in a folder for each."""
    # Imported late: settings name datasets, and a mistyped option need not wait for Pillow.
    from mfdetr_cache.coco.yolo import DataYaml

    for inner in sorted(f for f in folder.glob("*/") if any(f.name.lower() in s for s in _SAME)):
        files = [*inner.glob("*.json"), *inner.glob("annotations/*.json")]
        if len(files) == 1:  # of several, which is meant cannot be told
            yield inner.name, DatasetFiles(_images_in(inner), files[0])
    for path in sorted(folder.glob("*.y*ml")):
        for name, images in DataYaml(path).folders().items():
            yield name, DatasetFiles(images, path.with_name(f"{path.name}:{name}"))
    for path in sorted([*folder.glob("*.json"), *folder.glob("annotations/*.json")]):
        name = re.sub("^instances?_?", "", path.stem)
        places = [folder / name, folder / "images" / name] if name not in _WHOLE else []
        if name != path.stem or name in _WHOLE or any(name in same for same in _SAME):
            places += [folder / "images", folder / "data"]
        there = [p for p in places if p.is_dir() and p != path.parent]
        if there:
            yield "all" if name in _WHOLE else name, DatasetFiles(there[0], path)
    for path in sorted([*folder.glob(_ROBOFLOW), *folder.glob(f"*/{_ROBOFLOW}")]):
        yield path.parent.name, DatasetFiles(_images_in(path.parent), path)


def _images_in(folder: Path) -> Path:
    """The image folder of a split that has a folder of its own."""
    return next(p for p in (folder / "images", folder / "data", folder) if p.is_dir())


def _of_other_names(folder: Path, known: set[str]) -> dict[str, DatasetFiles]:
    """Splits besides the ``known`` ones, of JSON files with their name in theirs.

    As in ``coco_train.json``, or ``train_labels.json`` beside ``train_images``. The only file
    beside images is of the whole dataset. Which of several is meant cannot be told.
    """
    from mfdetr_cache.coco.yolo import is_image

    patterns = ("*.json", "annotations/*.json", "annotations/*/*.json")
    every = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    files = [path for path in every if not path.name.startswith(_OTHER_KINDS)]
    names = [_split_in(str(path.relative_to(folder).with_suffix(""))) for path in files]
    folders = sorted([*folder.glob("*/"), *folder.glob("images/*/")])
    shared = [p for p in (folder / "images", folder / "data") if p.is_dir()]
    found, taken = {}, {_split_in(name) for name in known}
    for path, name in zip(files, names, strict=True):
        own = [p for p in folders if _split_in(p.name) == name and p != path.parent]
        if name and name not in taken and names.count(name) == 1 and own + shared:
            found[name] = DatasetFiles((own + shared)[0], path)
    shared += [folder] if any(map(is_image, folder.glob("*"))) else []
    if shared and len(files) == len(every) == 1 and not found and not known:
        found["all"] = DatasetFiles(shared[0], files[0])
    return found


def _split_in(text: str) -> str:
    """The one split that a name or path speaks of; empty if there is none.

    Examples:
        >>> [_split_in(name) for name in ("coco_train", "val2017/labels", "train-val", "trains")]
        ['train', 'val', '', '']
    """
    words = {word.rstrip("0123456789") for word in re.split("[^a-z0-9]+", text.lower())}
    meant = [same for same in _SAME if same & words]
    return min(meant[0] & words) if len(meant) == 1 else ""
