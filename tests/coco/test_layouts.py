"""Datasets in the layouts that tools export give what the same COCO file gives."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mfdetr_cache.coco.annotations import CocoSplit, load_coco_split, require_images
from mfdetr_cache.coco.image_list import ImageEntry
from mfdetr_cache.coco.layouts import dataset_files, existing_annotations, find_split
from mfdetr_cache.errors import ConfigError, DatasetError, ImageError
from tests.support import scenes


@pytest.fixture
def plain(tmp_path: Path) -> CocoSplit:
    """Two images and their annotations, in the folder of the test."""
    scenes.write_scenes(tmp_path / "plain", count=2, seed=3)
    return load_coco_split(tmp_path / "plain/instances.json", tmp_path / "plain/images")


def moved(tmp_path: Path, images: str, annotations: str) -> Path:
    """The same dataset under other names."""
    folder = tmp_path / "dataset"
    (folder / images).parent.mkdir(parents=True, exist_ok=True)
    (folder / annotations).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tmp_path / "plain/images", folder / images, dirs_exist_ok=True)
    shutil.copy(tmp_path / "plain/instances.json", folder / annotations)
    return folder


@pytest.mark.parametrize(
    ("images", "annotations", "split"),
    [
        ("val2017", "annotations/instances_val2017.json", "val2017"),
        ("val2017", "annotations/instances_val2017.json", "val"),
        ("images/train", "annotations/instances_train.json", "train"),
        ("train", "train/_annotations.coco.json", "train"),
        ("valid", "valid/_annotations.coco.json", "val"),
        ("images", "instances.json", None),
        ("images/default", "annotations/instances_default.json", None),
        ("images", "annotations/train.json", "train"),
        ("train", "annotations/train.json", "train"),
        ("images", "annotations/instance_val.json", "val"),
        ("images", "result.json", None),
        ("data", "labels.json", None),
        ("Train", "annotations/instances_Train.json", "train"),
        ("train/data", "train/labels.json", "train"),
        ("val/images", "val/annotations/instances.json", "val"),
        ("Validation", "Validation/coco.json", "val"),
        ("images", "annotations/coco_val.json", "val"),
        ("train_images", "train_labels.json", "train"),
        ("train2017", "lvis_v1_train.json", "train"),
        ("images/val", "annotations/val/instances.json", "val"),
        ("images", "my.json", None),
        ("", "my.json", None),
        ("train/images", "train/_annotations.coco.json", "train"),
    ],
)
def test_splits_are_found_by_name(
    tmp_path: Path, plain: CocoSplit, images: str, annotations: str, split: str | None
) -> None:
    folder = moved(tmp_path, images, annotations)
    files = find_split(folder, split)
    assert (files.images, files.annotations) == (folder / images, folder / annotations)
    found = load_coco_split(files.annotations, files.images)
    require_images(files.images, found, "")
    assert found.images == plain.images


def test_images_in_a_folder_below_are_told(tmp_path: Path, plain: CocoSplit) -> None:
    folder = moved(tmp_path, "images/[1]", "instances.json")
    with pytest.raises(ImageError, match=r"2 of 2 images .* \(.*/images/\[1\]/.*\.png is there\)"):
        require_images(folder / "images", plain, "")
    shutil.rmtree(folder / "images/[1]")
    with pytest.raises(ImageError, match=r"the first is 0*100\.png; check"):
        require_images(folder / "images", plain, "check")


def test_json_of_something_else_is_no_split(tmp_path: Path, plain: CocoSplit) -> None:
    folder = moved(tmp_path, "images", "annotations/captions_val2017.json")
    (folder / "config.json").write_text("{}")
    with pytest.raises(DatasetError, match="has no split in a layout that is known"):
        find_split(folder, None)
    (folder / "annotations.json").write_text("{}")
    assert find_split(folder, None).images == folder / "images"


def test_other_names_are_splits_only_where_one_is_meant(tmp_path: Path, plain: CocoSplit) -> None:
    """Files of YOLO's layout or of another split take nothing from those that are known."""
    folder = moved(tmp_path, "train", "annotations/instances_train.json")
    for name in ("old_train.json", "a_val.json", "b_val.json", "train_val.json", "notes.json"):
        (folder / name).write_text("{}")
    assert find_split(folder, None).annotations == folder / "annotations/instances_train.json"


def test_what_a_folder_has_instead_of_splits_is_said(tmp_path: Path, plain: CocoSplit) -> None:
    folder = moved(tmp_path, "train", "train/_annotations.coco.json")
    with pytest.raises(DatasetError, match=rf"; {folder} has train"):
        find_split(tmp_path, "train")
    shutil.rmtree(folder)
    with pytest.raises(DatasetError, match="or use extract with --images and --annotations"):
        find_split(tmp_path / "plain/images", "train")
    for name in "ab":
        (tmp_path / f"plain/images/{name}.json").write_text('{"shapes": []}')
    with pytest.raises(DatasetError, match=r"; .*/a\.json looks like labelme, not COCO instances"):
        find_split(tmp_path / "plain/images", "train")


def test_what_is_not_there_is_named_with_what_is(tmp_path: Path, plain: CocoSplit) -> None:
    with pytest.raises(DatasetError, match="has no split in a layout that is known: COCO"):
        find_split(tmp_path, "train")
    moved(tmp_path, "train", "train/_annotations.coco.json")
    folder = moved(tmp_path, "test", "test/_annotations.coco.json")
    with pytest.raises(DatasetError, match="has no split 'val'; it has test, train"):
        find_split(folder, "val")
    with pytest.raises(DatasetError, match="give --split; it has test, train"):
        find_split(folder, None)
    with pytest.raises(ConfigError, match="give --images and --annotations, or --dataset"):
        dataset_files(tmp_path, None, None, None)
    with pytest.raises(ConfigError, match="stand in place of --images"):
        dataset_files(tmp_path, tmp_path, folder, "train")


def write_yolo(tmp_path: Path, yaml: str, lines: dict[str, list[str]]) -> Path:
    folder = tmp_path / "yolo"
    for name, text in lines.items():
        (folder / "train/images").mkdir(parents=True, exist_ok=True)
        (folder / "train/labels").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(folder / f"train/images/{name}.png")
        if text:
            (folder / f"train/labels/{name}.txt").write_text("\n".join(text) + "\n")
    (folder / "data.yaml").write_text(yaml)
    return folder


YAML = "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['dog', 'cat']\n"


NAMES = "names: [dog, cat]\n"


def named_alone(entry: ImageEntry) -> ImageEntry:
    """An image without the folder it is in."""
    return replace(entry, file_name=Path(entry.file_name).name)


@pytest.mark.parametrize(
    ("yaml", "lists"),
    [
        (YAML, {}),
        ("path: .\ntrain: train/images\nnames: {0: dog, 1: cat}\n", {}),
        (f"train: train\n{NAMES}", {}),
        (f"train: train.txt\n{NAMES}", {"train.txt": "./train/images/a.png\ntrain/images/b.png"}),
        (f"path: x\ntrain: lists/t.TXT\n{NAMES}", {"lists/t.TXT": "train/images/a.png\n\n../{b}"}),
        (
            f"train: /content/yolo/t.txt\n{NAMES}",
            {"t.txt": "\ufeff/content/yolo/{a}\r\nC:\\{b}\r\n"},
        ),
        (f"train: [a.txt, b.txt]\n{NAMES}", {"a.txt": "{here}/{a}\n", "b.txt": "./x/../{b}"}),
    ],
)
def test_yolo_polygons_are_those_of_coco(tmp_path: Path, yaml: str, lists: dict[str, str]) -> None:
    """Splits are folders, lists of images, or several of either."""
    for name, text in lists.items():
        (tmp_path / "yolo" / name).parent.mkdir(parents=True, exist_ok=True)
        of_b = "train\\images\\b.png" if "C:" in text else "train/images/b.png"
        filled = text.format(a="train/images/a.png", b=of_b, here=tmp_path / "yolo")
        (tmp_path / "yolo" / name).write_text(filled)
    folder = write_yolo(
        tmp_path,
        yaml,
        {
            "a": ["\ufeff1 0.1, 0.2 0.5 0.2, 0.5 0.8, 0.1 0.8", "", "0 0.6 0.6 0.9 0.6 0.9 0.9"],
            "b": [],
        },
    )
    files = find_split(folder, "train")
    split = load_coco_split(files.annotations, files.images)
    assert not any(f.repaired for f in split.faults)
    document: Any = {
        "images": [
            {"id": 1, "file_name": "a.png", "height": 100, "width": 200},
            {"id": 2, "file_name": "b.png", "height": 100, "width": 200},
        ],
        "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "segmentation": [[20, 20, 100, 20, 100, 80, 20, 80]]},
            {"image_id": 1, "category_id": 0, "segmentation": [[120, 60, 180, 60, 180, 90]]},
        ],
    }
    (tmp_path / "same.json").write_text(json.dumps(document))
    wanted = load_coco_split(tmp_path / "same.json")
    split = replace(split, images=tuple(named_alone(e) for e in split.images))
    assert (split.images, split.categories) == (wanted.images, wanted.categories)
    ours, theirs = (s.ground_truth(s.images[0], {}) for s in (split, wanted))
    for name in ("category_ids", "boxes_xyxy", "areas", "is_crowd"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert all((a == b).all() for a, b in zip(ours.run_lengths, theirs.run_lengths, strict=True))
    before = split.sha256
    (folder / "train/labels/b.TXT").write_text("0 0.1 0.1 0.9 0.1 0.9 0.9\n")
    more = load_coco_split(files.annotations, files.images)
    assert (more.sha256 != before, len(more.annotations[2])) == (True, 1)


def test_a_yolo_list_of_several_folders(tmp_path: Path) -> None:
    """Images of one name are told apart, and so are their labels; what is gone is named."""
    folder = write_yolo(tmp_path, "", {"a": ["0 0.1 0.2 0.5 0.2 0.5 0.8"]})
    shutil.copytree(folder / "train", folder / "more")
    (folder / "more/labels/a.txt").write_text("1 0 0 1 0 1 1\n1 0 0 1 0 1 1\n")
    (folder / "data.yaml").write_text(f"train: [more/images, train.txt]\nval: v.txt\n{NAMES}")
    (folder / "train/images/a%20.png").write_bytes((folder / "train/images/a.png").read_bytes())
    (folder / "train/labels/a .txt").write_text("0 0 0 1 0 1 1\n")
    listed = ("a.png", "a%20.png", "gone.png")
    (folder / "train.txt").write_text("".join(f"./train/images/{name}\n" for name in listed))
    (folder / "v.txt").write_text("")
    files = find_split(folder, None)
    assert (files.images, files.annotations.name) == (folder, "data.yaml:train")
    with pytest.raises(
        DatasetError, match=r"1 of 4 images cannot be used: .*train/images/gone\.png"
    ):
        load_coco_split(files.annotations, files.images)
    split = load_coco_split(files.annotations, files.images, on_bad="skip")
    names = ["more/images/a.png", "train/images/a.png", "train/images/a%20.png"]
    assert [e.file_name for e in split.images] == names
    assert [len(split.annotations[e.image_id]) for e in split.images] == [2, 1, 0]
    assert split.name == "train"
    # The same split without a dataset's folder, as relabel is told it.
    assert load_coco_split(files.annotations, on_bad="skip").sha256 == split.sha256
    assert existing_annotations(str(files.annotations)) == files.annotations
    with pytest.raises(DatasetError, match=r"no split 'val'; .*no image of .*v\.txt is there"):
        find_split(folder, "val")
    with pytest.raises(DatasetError, match=r"data\.yaml names no test"):
        load_coco_split(folder / "data.yaml:test")
    with pytest.raises(ValueError, match="there is no such file"):
        existing_annotations(f"{folder}/other.yaml:val")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", r"annotation a.txt:2 of image 1 has no mask"),
        ("7 0.1 0.1 0.9 0.1 0.9 0.9", "annotation a.txt:2 of image 1 has category_id 7, which is"),
        ("0 0.1 x 0.9 0.1 0.9 0.9", "annotation a.txt:2 of image 1 cannot be understood"),
        ("0 0.1 0.1 0.9 0.1 0.9", "5 numbers behind the class: x, y of three points or more, or"),
        ("0 0.1 0.1 0.9 0.1 0.9 0.9 0.8", "7 numbers behind the class"),
        ("0 10 10 90 10 90 90", "90 is no part of the image's sides, .* in pixels they are not"),
        ("0 0.1 0.1 nan 0.1 0.9 0.9", "is not finite"),
        ("0", "annotation a.txt:2 of image 1 has no mask"),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path: Path, line: str, message: str) -> None:
    folder = write_yolo(tmp_path, YAML, {"a": ["1 0.1 0.2 0.5 0.2 0.5 0.8", line]})
    files = find_split(folder, None)
    with pytest.raises(DatasetError, match=message):
        load_coco_split(files.annotations, files.images)
    kept = load_coco_split(files.annotations, files.images, on_bad="skip")
    assert len(kept.annotations[1]) == 1


def test_no_dataset_is_one_line(tmp_path: Path) -> None:
    folder = write_yolo(tmp_path, "a: 1\n\tb: 2\n", {"a": []})
    with pytest.raises(DatasetError, match=r"data.yaml is no YAML \(found .* in line 2\)"):
        find_split(folder, "train")
    (folder / "data.yaml").write_text("train: train/images\nnames: 5\n")
    with pytest.raises(DatasetError, match="data.yaml has no list of names"):
        load_coco_split(folder / "data.yaml", folder / "train/images")
    (folder / "data.yaml").write_text(YAML)
    looked = r"no image of .*images has a text file .* looked for at .*train/labels/a\.txt"
    with pytest.raises(DatasetError, match=looked):
        load_coco_split(folder / "data.yaml", folder / "train/images", needs="nothing")
    (folder / "train/labels/a.txt").write_text("")
    (folder / "train/images/._a.png").write_bytes(b"a note of macOS")
    with pytest.raises(DatasetError, match="has an empty list 'annotations'"):
        load_coco_split(folder / "data.yaml", folder / "train/images")
    (folder / "train/images/b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DatasetError, match=r"image 2 \(b\.HEIC\) .* it is HEIC: save it as PNG"):
        load_coco_split(folder / "data.yaml", folder / "train/images", needs="nothing")
    with pytest.raises(DatasetError, match="its images are needed too"):
        load_coco_split(folder / "data.yaml")


@pytest.mark.parametrize(
    "value", ["[train/images]", "/content/ds/train/images", "C:\\Users\\me\\ds\\train\\images"]
)
def test_a_yolo_split_is_found_where_it_is(tmp_path: Path, value: str) -> None:
    folder = write_yolo(tmp_path, f"path: /content\ntrain: {value}\nnames: [dog]\n", {"a": []})
    assert find_split(folder, "train").images == folder / "train/images"


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("train: [a, b]\nnames: [dog]\n", r"data\.yaml: train is \['a', 'b'\], no folder or list"),
        (
            "train: train.txt\nnames: [dog]\n",
            r"data\.yaml: train is 'train.txt', no folder or list",
        ),
        (
            "train: /x/images\nnames: [dog]\n",
            r"train is '/x/images', no folder or list of images that",
        ),
        ("train: train/images\nnc: 3\n", r"data\.yaml has no names of its classes"),
        ("names: [dog]\n", r"data\.yaml names no folder as train, val or test"),
        ("other: 1\n", r"use extract with --images and --annotations$"),
        ("val: train/images\ntrain: no\nnames: [dog]\n", "it has val; .* train is 'no', no folder"),
    ],
)
def test_what_is_wrong_with_a_data_yaml_is_said(tmp_path: Path, yaml: str, said: str) -> None:
    folder = write_yolo(tmp_path, yaml, {"a": []})
    (folder / "images").mkdir()
    with pytest.raises(DatasetError, match=said):
        find_split(folder, "train")


def test_names_of_classes_are_text_and_no_bombs(tmp_path: Path) -> None:
    """A class called "no" stays one, and aliases of aliases are not written out."""
    folder = write_yolo(
        tmp_path,
        "train:\nval: train/images\nnames: [no, 007, 1.50]\n",
        {"a": ["0 0.1 0.2 0.5 0.2 0.5 0.8"]},
    )
    files = find_split(folder, None)
    split = load_coco_split(files.annotations, files.images)
    assert [c.name for c in split.categories] == ["no", "007", "1.50"]
    letters = "abcdefghijkl"
    lines = [f"a: &a [{', '.join(['x'] * 9)}]"]
    for before, name in itertools.pairwise(letters):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    bomb = "\n".join([*lines, "path: *l", "val: train/images", "names: *l"])
    (folder / "data.yaml").write_text(bomb)
    files = find_split(folder, None)
    with pytest.raises(DatasetError, match=r"data\.yaml: one of its names is \[\["):
        load_coco_split(files.annotations, files.images)
