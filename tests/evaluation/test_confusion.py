"""What objects are taken for, on a scene where every answer is known."""

from typing import Any

from mfdetr_cache.evaluation.coco_metrics import coco_ground_truth
from mfdetr_cache.evaluation.confusion import Confusion, confusions
from tests.support.rectangles import rectangle, rectangles

SIZE_HW = (80, 120)
CAT, DOG, FOX = 3, 5, 9
CATEGORIES = [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}, {"id": FOX, "name": "fox"}]


def result(image_id: int, category: int, score: float, *box: Any) -> dict[str, Any]:
    mask = rectangle(SIZE_HW, box)
    return {"image_id": image_id, "category_id": category, "score": score, "segmentation": mask}


def test_an_object_is_what_its_most_confident_mask_says() -> None:
    first = rectangles(
        SIZE_HW,
        ((0, 0, 20, 20), CAT, False),
        ((30, 0, 50, 20), CAT, False),
        ((60, 0, 80, 20), DOG, False),
        ((0, 40, 40, 80), FOX, True),
    )
    second = rectangles(SIZE_HW, ((0, 0, 20, 20), DOG, False))
    truth = coco_ground_truth([(1, SIZE_HW, first), (2, SIZE_HW, second)], CATEGORIES)
    found = [
        result(1, CAT, 0.3, 0, 0, 20, 20),
        result(1, FOX, 0.9, 0, 0, 9, 20),  # IoU 0.45: no mask of the first object
        result(1, CAT, 0.4, 30, 0, 50, 20),
        result(1, DOG, 0.6, 30, 0, 50, 11),  # IoU 0.55, and more confident than the right one
        result(1, FOX, 0.9, 0, 40, 40, 80),  # on a crowd
        result(2, DOG, 0.2, 0, 0, 20, 20),
    ]
    assert set(confusions(truth, found)) == {
        Confusion("cat", "cat", 1),
        Confusion("cat", "dog", 1),
        Confusion("dog", None, 1),
        Confusion("dog", "dog", 1),
    }
    assert confusions(truth, [])[0] == Confusion("cat", None, 2)
