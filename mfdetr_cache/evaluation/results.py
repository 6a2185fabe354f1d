"""COCO results of one image: boxes and masks."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.evaluation.coco_metrics import Result
from mfdetr_cache.evaluation.detections import Detections
from mfdetr_cache.ops.masks import plain_rle


def box_results(
    image_id: int, detections: Detections, label_categories: Sequence[int]
) -> list[Result]:
    """COCO box results of the detections whose label has a category.

    ``label_categories`` are the category ids of each label, -1 for none.
    """
    boxes, scores = detections.boxes_xyxy.tolist(), detections.class_scores.tolist()
    return [
        {
            "image_id": image_id,
            "category_id": category_id,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": scores[index],
        }
        for index, category_id in _with_category(detections, label_categories)
        for x0, y0, x1, y1 in [boxes[index]]
    ]


def mask_result(image_id: int, category_id: int, rle: dict[str, Any], confidence: float) -> Result:
    """COCO result of one mask, RLE at the original size."""
    return {
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": rle,
        "score": confidence,
    }


def mask_results(
    image_id: int,
    detections: Detections,
    label_categories: Sequence[int],
    rles: Sequence[dict[str, Any]],
    confidences: NDArray[np.float64],
) -> list[Result]:
    """COCO mask results of the D detections whose label has a category.

    ``label_categories`` are the category ids of each label, -1 for none.
    """
    return [
        mask_result(image_id, category_id, rles[index], float(confidences[index]))
        for index, category_id in _with_category(detections, label_categories)
    ]


def _with_category(
    detections: Detections, label_categories: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Index and category id of the detections whose label has a category."""
    for index, label in enumerate(detections.labels.tolist()):
        if label_categories[label] >= 0:
            yield index, label_categories[label]


def json_results(results: Sequence[Result]) -> bytes:
    """A COCO results file, as JSON, of mask results with compressed RLE."""
    plain = [{**result, "segmentation": plain_rle(result["segmentation"])} for result in results]
    return json.dumps(plain).encode()
