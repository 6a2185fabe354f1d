import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.errors import DatasetError
from tests.support import scenes
from tests.support.scenes import told, written


def test_ground_truth_is_complete(scenes_folder: Path, document: dict[str, Any]) -> None:
    split = load_coco_split(scenes_folder / "instances.json")
    assert [e.image_id for e in split.images] == [i["id"] for i in document["images"]]
    truth = split.ground_truth(split.images[0], {3: 0, 7: 1})
    assert truth.labels.tolist() == [0, 1]
    assert truth.category_ids.tolist() == [3, 7]
    x, y, w, h = document["annotations"][0]["bbox"]
    assert truth.boxes_xyxy[0].tolist() == [x, y, x + w, y + h]
    assert np.isclose(
        truth.run_lengths[1][1::2].sum(), document["annotations"][1]["area"], rtol=0.1
    )


def test_categories_the_detector_lacks_have_label_minus_one(scenes_folder: Path) -> None:
    split = load_coco_split(scenes_folder / "instances.json")
    assert split.ground_truth(split.images[0], {7: 1}).labels.tolist() == [-1, 1]


def change(where: str, position: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    """Replace fields of an entry of a document; ``...`` removes one."""

    def apply(document: dict[str, Any]) -> None:
        entry = document[where][position]
        for key, value in fields.items():
            if value is ...:
                del entry[key]
            else:
                entry[key] = value

    return apply


def empty(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update({key: []})


def append(key: str, entry: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document[key].append(entry)


# The coordinates of a polygon in two lists: no tool means two polygons.
COLUMNS = {"x": [5, 30, 30, 5, 5, 30], "y": [5, 5, 40, 40, 5, 5]}
FAULTS = [
    (empty("annotations"), "empty list 'annotations'"),
    (empty("images"), "empty list 'images'"),
    (
        change("annotations", 2, category_id=99),
        "1002 of image 105 has category_id 99, which is not",
    ),
    (change("annotations", 2, category_id=None), "1002 of image 105 has category_id None, which"),
    (change("annotations", 2, image_id=99), "1002 is of image 99, which is not in its list of im"),
    (append("annotations", 7), r"annotation 16 \(counted from 0\) is 7"),
    (change("images", 1, id=100), "lists an image id twice: 100 is"),
    (change("images", 1, id=None), r"image 1 \(counted from 0\) lacks an 'id'"),
    (change("images", 1, height=2**40), "image 105 .* is an image of 1099511627776 x"),
    (change("images", 1, file_name="../../.ssh/id"), "which leaves the image folder"),
    (change("images", 1, file_name="a/..\\\\..\\\\b.png"), "which leaves the image folder"),
    (change("images", 1, file_name="/etc/passwd"), "file_name '/etc/passwd', which is absolute"),
    (change("images", 1, file_name="C:\\\\photos\\\\a.png"), "which is absolute"),
    (change("images", 1, file_name="a\0.png"), "which is no name of a file"),
    (change("images", 1, file_name="\u00e9" * 200), "which is too long for a file"),
    (change("images", 1, file_name="a/" * 5000), r"a/\.\.\.', which is too long for a file"),
    (change("images", 1, file_name="\udc00.png"), "which is no name of a file"),
    (change("categories", 1, id=3), "two categories of id 3: 'ellipse' and 'box'"),
    (change("categories", 1, id=None), "category 1 .* lacks an 'id'"),
    (lambda d: d.update(categories=[{}] * 20_001), "has 20001 categories, the limit is 20000"),
    (
        change("annotations", 2, iscrowd="maybe"),
        "1002 of image 105 .*iscrowd 'maybe'; it is 0 or 1",
    ),
    (change("annotations", 2, iscrowd=2), "iscrowd 2; it is 0 or 1"),
    (change("annotations", 2, segmentation=None), "annotation 1002 of image 105 has no mask"),
    (change("annotations", 2, segmentation=...), "annotation 1002 of image 105 has no mask"),
    (change("annotations", 2, segmentation=[[]]), "annotation 1002 of image 105 has no mask"),
    (change("annotations", 2, segmentation={"points": [[1, 2]]}), "is no RLE, which has size and"),
    (change("annotations", 2, segmentation=[[{"x": 1}]]), "no number: .{'x': 1}."),
    (change("annotations", 2, segmentation={"x": 5, "y": 5}), "{'x': 5, 'y': 5} is no RLE"),
    (change("annotations", 2, segmentation=COLUMNS), "{'x': .*, 'y': .*} is no RLE"),
    (change("annotations", 2, segmentation=[COLUMNS]), "{'x': .*, 'y': .*} is no RLE"),
    (change("images", 1, file_name=math.nan), "image 105 lacks a 'file_name' .it is nan"),
    (change("images", 1, file_name=...), "image 105 lacks a 'file_name' .it has 'id', 'height'"),
    (lambda d: d.update(categories=["cat"]), "category 0 .* lacks an 'id'; it is 'cat'"),
    (lambda d: d.update(images={"1": 2}), "has no list 'images', but {'1': 2}; is it COCO"),
    (lambda d: d.pop("annotations"), "'annotations', .*Test images come without: nothing"),
    (change("annotations", 2, segmentation=5), "a segmentation is a list of polygons or an RLE"),
    (change("annotations", 2, segmentation=[[5, 5, 2e8, 5, 2e8, 2e8]]), "1002 .* reaches x = 2e"),
    (change("annotations", 2, segmentation=[[5, 5, 1e300, 5, 9, 9]]), "reaches x = 1e"),
    (change("annotations", 2, segmentation=[[5, 5, math.nan, 5, 9, 9]]), "is not finite"),
    (change("annotations", 2, segmentation=[[500, 5, 600, 5, 600, 9]]), "lie outside the image"),
    (change("annotations", 2, segmentation={"size": [5, 5], "counts": [25]}), "RLE of size"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS)
def test_faults_are_named(
    tmp_path: Path, scenes_folder: Path, document: dict[str, Any], spoil: Any, message: str
) -> None:
    spoil(document)
    with pytest.raises(DatasetError, match=message):
        load_coco_split(written(tmp_path, document), scenes_folder / "images")


def test_all_faults_are_named_at_once_and_can_be_left_out(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    for annotation in document["annotations"][3:]:
        annotation["segmentation"] = []
    path = written(tmp_path, document)
    with pytest.raises(DatasetError) as caught:
        load_coco_split(path)
    said = str(caught.value)
    assert "13 of 16 annotations cannot be used: annotation 1003 of image 105 has no" in said
    assert "annotation 1012 " in said
    assert "annotation 1013 " not in said
    assert said.endswith("; and 3 more; --on-bad-annotation skip leaves them out")
    split = load_coco_split(path, on_bad="skip")
    assert [len(split.annotations[e.image_id]) for e in split.images] == [2, 1, *[0] * 6]
    assert "left out: 13 of 16 annotations cannot be used" in told(split)[0]
    kept = load_coco_split(path, needs="boxes")
    assert sum(len(a) for a in kept.annotations.values()) == 16
    assert len(kept.ground_truth(kept.images[-1], {}).run_lengths[0]) == 0


def test_an_image_that_cannot_be_used_is_left_out_with_its_annotations(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    document["images"][1]["width"] = 0
    path = written(tmp_path, document)
    split = load_coco_split(path, on_bad="skip")
    assert [e.image_id for e in split.images] == [i["id"] for i in document["images"] if i["width"]]
    assert split.faults[0].unusable == 1
    assert split.faults[1].unusable == 0


def test_a_limit_looks_at_nothing_else(tmp_path: Path, document: dict[str, Any]) -> None:
    document["annotations"][-1]["segmentation"] = None
    document["images"][-1]["height"] = None
    path = written(tmp_path, document)
    assert len(load_coco_split(path, limit=3).images) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds a list, as results are; COCO instances are an object with the lists"),
        (5, "holds 5; COCO instances"),
        ([{"data": {}}], r"holds a list, as results are \(its first entry has 'data'\); COCO"),
        ({"items": [], "info": {}}, "has no list 'images', but 'items', 'info'; is it COCO"),
    ],
)
def test_files_of_other_kinds_are_told(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_coco_split(written(tmp_path, content))


def test_a_panoptic_file_is_told(tmp_path: Path, document: dict[str, Any]) -> None:
    document["annotations"] = [{"image_id": 100, "segments_info": [], "file_name": "a.png"}]
    with pytest.raises(DatasetError, match="is a panoptic one; pass COCO instances"):
        load_coco_split(written(tmp_path, document))


def test_null_names_are_no_names(tmp_path: Path, document: dict[str, Any]) -> None:
    document["categories"][1]["name"] = None
    names = [c.name for c in load_coco_split(written(tmp_path, document)).categories]
    assert names == ["ellipse", "category 7", "crowd"]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([-1, 0, 1, 3, 7, 100, 1000, 1e10, 1e300, -0.5, "1", "\ud800", "[1]", "b'0'"])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=8)
        | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner, max_size=3)
    ),
    max_leaves=12,
)
FIELDS = (
    [("images", key) for key in ("id", "file_name", "height", "width")]
    + [
        ("annotations", key)
        for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    ]
    + [("categories", key) for key in ("id", "name")]
)


@given(
    changes=st.lists(st.tuples(st.sampled_from(FIELDS), st.integers(0, 7), values), min_size=1),
    on_bad=st.sampled_from(["stop", "skip"]),
)
@settings(max_examples=200)
def test_whatever_stands_in_a_file_is_right_or_one_line(
    scenes_folder: Path, tmp_path_factory: pytest.TempPathFactory, changes: Any, on_bad: Any
) -> None:
    document = scenes.load_annotations(scenes_folder)
    for (key, field), position, value in changes:
        entries = document[key]
        entries[position % len(entries)][field] = value
    path = tmp_path_factory.getbasetemp() / "whatever.json"
    path.write_text(json.dumps(document))
    try:
        split = load_coco_split(path, on_bad=on_bad)
    except DatasetError:
        return
    for entry in split.images:
        truth = split.ground_truth(entry, {})
        assert np.isfinite(truth.boxes_xyxy).all()
        assert np.isfinite(truth.areas).all()
        assert all(int(r.sum()) == entry.size_hw[0] * entry.size_hw[1] for r in truth.run_lengths)
