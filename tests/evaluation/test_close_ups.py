from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mfdetr_cache.evaluation.close_ups import close_ups, selections
from tests.support.rectangles import rectangle

SIZE_HW = (40, 60)


def result(segmentation: dict[str, Any], category_id: int = 1) -> dict[str, Any]:
    return {
        "image_id": 7,
        "category_id": category_id,
        "score": 0.5,
        "segmentation": segmentation,
    }


@pytest.fixture
def ground_truth() -> COCO:
    """Two objects, a crowd and one with a box only."""
    coco = COCO()
    objects = ((1, rectangle(SIZE_HW, (10, 10, 30, 30))), (2, rectangle(SIZE_HW, (40, 20, 50, 30))))
    annotation = {"image_id": 7, "iscrowd": 0, "bbox": [10, 10, 20, 20]}
    coco.dataset = {
        "images": [{"id": 7, "height": SIZE_HW[0], "width": SIZE_HW[1]}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            *({**annotation, "category_id": c, "segmentation": s} for c, s in objects),
            {**annotation, "category_id": 1, "segmentation": objects[0][1], "iscrowd": 1},
            {**annotation, "category_id": 1},
        ],
    }
    for number, entry in enumerate(coco.dataset["annotations"], 1):
        entry["id"] = number
    coco.createIndex()
    return coco


def test_every_subject_shows_its_best_mask(ground_truth: COCO) -> None:
    half = rectangle(SIZE_HW, (10, 10, 30, 20))
    far = rectangle(SIZE_HW, (0, 0, 5, 5))
    first = [result(far), result(half), result(rectangle(SIZE_HW, (10, 10, 30, 30)), 2)]
    whole = ground_truth.dataset["annotations"][0]["segmentation"]
    shown = close_ups(ground_truth, [first, [result(whole)], []])
    # Nobody finds the second object: a mask of another category is none.
    assert [o.category_id for o in shown] == [1]
    assert shown[0].ious.tolist() == [0.5, 1.0, 0.0]
    assert shown[0].masks[2] is None
    photo = Image.new("RGB", SIZE_HW[::-1], (100, 100, 100))
    panels = shown[0].panels(photo, ["x", "y", "z"])
    assert [title for title, _ in panels] == [
        *("image", "annotation"),
        *("x, IoU 50", "y, IoU 100", "z, IoU 0"),
    ]
    # The photo around the box with a margin of 0.2 times the box and two pixels, 32 x 32, enlarged.
    pixels = [np.array(image) for _, image in panels]
    assert {p.shape[0] / p.shape[1] for p in pixels} == {1.0}
    coloured = [float((p != pixels[0]).any(-1).mean()) for p in pixels]
    assert coloured == pytest.approx([0, 400 / 1024, 200 / 1024, 400 / 1024, 0])


def test_objects_are_chosen_by_difference_and_quality_and_none_twice(ground_truth: COCO) -> None:
    whole, other = (a["segmentation"] for a in ground_truth.dataset["annotations"][:2])
    part = rectangle(SIZE_HW, (40, 20, 50, 25))
    subjects = [[result(whole), result(part, 2)], [result(whole), result(other, 2)]]
    shown = close_ups(ground_truth, subjects)
    chosen = {name: [o.category_id for o in found] for name, found in selections(shown, 1).items()}
    assert chosen == {
        "Where they differ most": [2],
        "Worst of all that are found": [1],
        "From the worst to the best, evenly": [],
    }
