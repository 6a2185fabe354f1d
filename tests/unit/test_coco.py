import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfdetr_cache.coco.annotations import Category, load_coco_split
from mfdetr_cache.coco.categories import categories_of_labels
from mfdetr_cache.errors import DatasetError
from tests.support import scenes


@pytest.fixture
def document(scenes_folder: Path) -> dict[str, Any]:
    return scenes.load_annotations(scenes_folder)


def written(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(document))
    return path


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


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="absent.json does not exist"):
        load_coco_split(tmp_path / "absent.json")


def test_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.json"
    path.write_text("hello")
    with pytest.raises(DatasetError, match="is not JSON"):
        load_coco_split(path)


def change_category(document: dict[str, Any]) -> None:
    document["annotations"][2]["category_id"] = 99


def change_image(document: dict[str, Any]) -> None:
    document["annotations"][2]["image_id"] = 99


def drop_annotations(document: dict[str, Any]) -> None:
    document["annotations"] = []


def drop_images(document: dict[str, Any]) -> None:
    document["images"] = []


def double_image(document: dict[str, Any]) -> None:
    document["images"].append(document["images"][0])


def drop_area(document: dict[str, Any]) -> None:
    del document["annotations"][0]["area"]


def drop_height(document: dict[str, Any]) -> None:
    del document["images"][0]["height"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_category, "annotation 1002 has category_id 99, which is not in its list"),
        (change_image, "annotation 1002 is of image 99, which is not in its list of images"),
        (drop_annotations, "empty list 'annotations'"),
        (drop_images, "empty list 'images'"),
        (double_image, "lists an image id twice"),
        (drop_area, "an annotation lacks 'area'"),
        (drop_height, "lacks 'height'"),
    ],
)
def test_faults_are_named(
    tmp_path: Path, document: dict[str, Any], change: Any, message: str
) -> None:
    change(document)
    with pytest.raises(DatasetError, match=message):
        load_coco_split(written(tmp_path, document))


def test_boxes_only_annotations_are_named(tmp_path: Path, document: dict[str, Any]) -> None:
    del document["annotations"][0]["segmentation"]
    split = load_coco_split(written(tmp_path, document))
    with pytest.raises(
        DatasetError, match="annotation 1000 of image 100 has no usable bbox and seg"
    ):
        split.ground_truth(split.images[0], {})


CATEGORIES = [Category(1, "person"), Category(44, "bottle"), Category(90, "tooth-brush")]


def test_names_decide() -> None:
    assert categories_of_labels(["Bottle", "tooth brush", "sofa"], CATEGORIES, "d") == (44, 90, -1)


def test_91_outputs_are_category_ids() -> None:
    found = categories_of_labels([f"LABEL_{i}" for i in range(91)], CATEGORIES, "d")
    assert (found[1], found[44], found[90], found[2]) == (1, 44, 90, -1)


def test_equal_counts_follow_ascending_ids() -> None:
    assert categories_of_labels(["a", "b", "c"], list(reversed(CATEGORIES)), "d") == (1, 44, 90)


def test_no_rule_is_an_error() -> None:
    with pytest.raises(DatasetError, match="no name is in both"):
        categories_of_labels(["a", "b"], CATEGORIES, "some detector")
