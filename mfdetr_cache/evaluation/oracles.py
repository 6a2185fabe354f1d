"""What mask AP would be if one thing were perfect and everything else as it is.

Which part to work on next: how good the head's masks could get, the order they are ranked in, the
detector's boxes, its labels, or the objects it misses. Each is an upper bound on its own, and they
do not add up.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mfdetr_cache.evaluation.baselines import SAME_OBJECT_IOU, oracle_masks
from mfdetr_cache.evaluation.coco_metrics import Result
from mfdetr_cache.evaluation.detections import Detections
from mfdetr_cache.evaluation.results import mask_result, mask_results
from mfdetr_cache.ops.boxes import box_iou, cxcywh_to_xyxy, scale_boxes, xyxy_to_cxcywh
from mfdetr_cache.ops.masks import compress_run_lengths, rle_iou
from mfdetr_cache.types import CachedImage

Oracle = Literal["masks", "scores", "boxes", "labels", "found"]
ORACLES: dict[Oracle, str] = {
    "masks": "annotated mask in the box",
    "scores": "true IoU as score",
    "boxes": "the object's box",
    "labels": "the object's category",
    "found": "missed objects added",
}


def with_perfect_boxes(image: CachedImage) -> CachedImage:
    """The image with the box of the object of highest IoU, if 0.5 or more, for every query.

    Categories are ignored, and so are crowds.
    """
    truth, size_hw = image.ground_truth, image.geometry.original_hw
    objects = np.flatnonzero(~truth.is_crowd)
    if not len(objects):
        return image
    boxes = torch.from_numpy(np.array(image.boxes_cxcywh_norm))
    targets = torch.from_numpy(truth.boxes_xyxy[objects])
    overlap = box_iou(scale_boxes(cxcywh_to_xyxy(boxes), size_hw), targets)
    height, width = size_hw
    exact = xyxy_to_cxcywh(targets / targets.new_tensor([width, height, width, height]))
    best, index = overlap.max(dim=1)
    chosen = torch.where((best >= SAME_OBJECT_IOU)[:, None], exact[index], boxes)
    return replace(image, boxes_cxcywh_norm=chosen.numpy())


def oracle_results(
    image: CachedImage,
    detections: Detections,
    label_categories: Sequence[int],
    rles: Sequence[dict[str, Any]],
    confidences: NDArray[np.float64],
) -> dict[str, list[Result]]:
    """The results of one image with one thing perfect at a time; ``boxes`` are not among them.

    ``scores``: of the masks of an object's category the one that overlaps it most gets its IoU,
    every other mask 0. "Overlaps" means a mask IoU of 0.5 or more, COCO's loosest threshold; crowds
    are no objects. ``labels``: a mask that overlaps an object gets its category, and of one query's
    detections the most confident stays for each category. ``found``: an object of whose category no
    mask overlaps it is added, with its annotated mask and a score of 1.

    The image's maps are not needed. ``label_categories`` are the category ids of each label, -1 for
    none; ``rles`` and ``confidences``, shape (D,), the head's masks and final scores of the D
    detections.
    """
    truth, size_hw, image_id = image.ground_truth, image.geometry.original_hw, image.image_id
    categories = np.array([label_categories[int(v)] for v in detections.labels], dtype=np.int64)
    objects = np.flatnonzero(~truth.is_crowd & truth.has_mask)
    drawn = [compress_run_lengths(truth.run_lengths[i], size_hw) for i in objects]
    overlap = rle_iou(rles, drawn)
    of_objects = truth.category_ids[objects]
    same = categories[:, None] == of_objects[None]
    annotated = oracle_masks(detections, truth, label_categories, size_hw)

    def listed(masks: Sequence[dict[str, Any]], scores: NDArray[np.float64]) -> list[Result]:
        return mask_results(image_id, detections, label_categories, masks, scores)

    results = listed(rles, confidences)
    missed = np.flatnonzero(~((overlap >= SAME_OBJECT_IOU) & same).any(axis=0))
    added = [mask_result(image_id, int(of_objects[i]), drawn[i], 1.0) for i in missed]
    if len(objects):
        covered = overlap.max(axis=1) >= SAME_OBJECT_IOU
        categories = np.where(covered, of_objects[overlap.argmax(axis=1)], categories)
    return {
        "masks": listed(annotated, confidences),
        "scores": listed(rles, _true_scores(overlap * same)),
        "labels": _one_per_query(image_id, detections, categories, rles, confidences),
        "found": results + added,
    }


def _true_scores(overlap: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each object's masks the best gets its IoU, shape (D,); duplicates and others get 0."""
    scores = np.zeros(len(overlap))
    if overlap.size:
        np.maximum.at(scores, overlap.argmax(axis=0), overlap.max(axis=0))
    return scores


def _one_per_query(
    image_id: int,
    detections: Detections,
    categories: NDArray[np.int64],
    rles: Sequence[dict[str, Any]],
    confidences: NDArray[np.float64],
) -> list[Result]:
    """Results under other categories, the most confident of each query and category."""
    results, seen = [], set()
    for index in np.argsort(-confidences, kind="stable").tolist():
        category_id = int(categories[index])
        key = (int(detections.query_index[index]), category_id)
        if category_id < 0 or key in seen:
            continue
        seen.add(key)
        results.append(mask_result(image_id, category_id, rles[index], float(confidences[index])))
    return results
