"""One thing perfect at a time, on a scene where every answer is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mfdetr_cache.evaluation.coco_metrics import CocoMetrics, coco_ground_truth, evaluate_results
from mfdetr_cache.evaluation.detections import Detections
from mfdetr_cache.evaluation.oracles import ORACLES, oracle_results, with_perfect_boxes
from mfdetr_cache.evaluation.results import mask_results
from mfdetr_cache.ops.boxes import cxcywh_to_xyxy, scale_boxes
from mfdetr_cache.types import CachedImage, GroundTruth
from tests.support.images import make_image, make_spec
from tests.support.rectangles import rectangle, rectangles

SIZE_HW = (80, 120)
# x0, y0, x1, y1 and category: two that are found, one that is missed, a crowd.
OBJECTS = (
    ((10, 10, 30, 30), 1, False),
    ((40, 10, 60, 30), 2, False),
    ((80, 50, 110, 70), 1, False),
    ((0, 40, 40, 80), 2, True),
)
LABEL_CATEGORIES = (1, 2)
CATEGORIES = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]


def rle_of(box: tuple[int, int, int, int]) -> dict[str, Any]:
    return rectangle(SIZE_HW, box)


@pytest.fixture
def image() -> CachedImage:
    truth = rectangles(SIZE_HW, *OBJECTS)
    return make_image(make_spec(), original_hw=SIZE_HW, ground_truth=truth)


@pytest.fixture
def detections() -> Detections:
    """By falling score: nothing there; the second object under a wrong label; the first; the
    second under its own label."""
    boxes = [(62, 0, 78, 40), (40, 10, 60, 30), (10, 10, 30, 30), (40, 10, 60, 30)]
    return Detections(
        query_index=torch.tensor([2, 1, 0, 1]),
        labels=torch.tensor([0, 0, 0, 1]),
        class_scores=torch.tensor([0.9, 0.8, 0.5, 0.3]),
        boxes_xyxy=torch.tensor(boxes, dtype=torch.float32),
    )


# The first object's mask is three quarters of it.
MASKS = [rle_of(b) for b in ((62, 0, 78, 40), (40, 10, 60, 30), (10, 10, 25, 30), (40, 10, 60, 30))]


def oracles_of(image: CachedImage, detections: Detections) -> dict[Any, list[dict[str, Any]]]:
    scores = detections.class_scores.double().numpy()
    return oracle_results(image, detections, LABEL_CATEGORIES, MASKS, scores)


def metrics(image: CachedImage, results: list[dict[str, Any]]) -> CocoMetrics:
    truth = coco_ground_truth([(image.image_id, SIZE_HW, image.ground_truth)], CATEGORIES)
    return evaluate_results(truth, results, "segm")


def test_only_the_one_thing_changes(image: CachedImage, detections: Detections) -> None:
    found = oracles_of(image, detections)
    assert set(found) == set(ORACLES) - {"boxes"}

    def rows(name: str) -> list[tuple[int, float]]:
        return [(r["category_id"], round(r["score"], 6)) for r in found[name]]

    assert rows("masks") == [(1, 0.9), (1, 0.8), (1, 0.5), (2, 0.3)]
    assert found["masks"][2]["segmentation"] == rle_of(OBJECTS[0][0])
    assert found["masks"][0]["segmentation"] == MASKS[0]  # there is no object: the box
    # The second object is of another category than the label says: no IoU to speak of.
    assert rows("scores") == [(1, 0.0), (1, 0.0), (1, 0.75), (2, 1.0)]
    # The query of the second object keeps one detection, under the object's category.
    assert rows("labels") == [(1, 0.9), (2, 0.8), (1, 0.5)]
    assert rows("found") == [(1, 0.9), (1, 0.8), (1, 0.5), (2, 0.3), (1, 1.0)]
    assert found["found"][-1]["segmentation"]["counts"] == rle_of(OBJECTS[2][0])["counts"]


def test_what_each_is_worth(image: CachedImage, detections: Detections) -> None:
    """By hand: of category 1 one of two objects is found, at 0.75, behind two false ones."""
    scores = detections.class_scores.double().numpy()
    plain = mask_results(image.image_id, detections, LABEL_CATEGORIES, MASKS, scores)
    found = oracles_of(image, detections)
    half = 51 / 101  # a recall of one in two covers the points 0, 0.01 to 0.50
    first = half / 3  # its precision is one in three
    assert pytest.approx((6 * first / 10 + 1) / 2) == metrics(image, plain).AP
    assert pytest.approx((first + 1) / 2) == metrics(image, found["masks"]).AP
    assert pytest.approx((6 * half / 10 + 1) / 2) == metrics(image, found["scores"]).AP
    assert pytest.approx((6 * half / 2 / 10 + 1) / 2) == metrics(image, found["labels"]).AP
    # The added one comes first; the other is then the second of four that is right.
    both = half + 50 / 101 * 2 / 4
    assert pytest.approx(((6 * both + 4 * half) / 10 + 1) / 2) == metrics(image, found["found"]).AP


def test_boxes_become_those_of_their_objects(image: CachedImage) -> None:
    boxes = np.array(image.boxes_cxcywh_norm)
    boxes[0, 2:] *= (1.2, 0.8)  # of the first object, IoU 0.8 / 1.2
    boxes[1, 0] += 0.12  # of the second, IoU below a half
    boxes[3] = (20 / 120, 60 / 80, 40 / 120, 40 / 80)  # the crowd itself
    moved = replace(image, boxes_cxcywh_norm=boxes)
    exact = with_perfect_boxes(moved)
    corners = scale_boxes(cxcywh_to_xyxy(torch.from_numpy(exact.boxes_cxcywh_norm)), SIZE_HW)
    assert corners[0].tolist() == pytest.approx(OBJECTS[0][0], abs=1e-4)
    assert np.array_equal(exact.boxes_cxcywh_norm[[1, 3]], boxes[[1, 3]])
    assert np.array_equal(moved.boxes_cxcywh_norm, boxes)


def test_an_image_without_objects_or_detections(image: CachedImage, detections: Detections) -> None:
    nothing = {
        name: getattr(image.ground_truth, name)[:0] for name in GroundTruth.__dataclass_fields__
    }
    empty = replace(image, ground_truth=GroundTruth(**nothing))
    assert with_perfect_boxes(empty) is empty
    found = oracles_of(empty, detections)
    assert [r["score"] for r in found["scores"]] == [0, 0, 0, 0]
    assert len(found["found"]) == len(found["masks"]) == 4
    none = Detections(*(getattr(detections, n)[:0] for n in Detections.__dataclass_fields__))
    found = oracle_results(image, none, LABEL_CATEGORIES, [], np.zeros(0))
    assert [len(found[n]) for n in ("masks", "scores", "labels", "found")] == [0, 0, 0, 3]
