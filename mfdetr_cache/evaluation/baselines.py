"""Masks without a mask network: floor and ceiling of a trained head."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mfdetr_cache.evaluation.detections import Detections
from mfdetr_cache.ops.boxes import box_iou
from mfdetr_cache.ops.masks import decode_run_lengths, encode_mask
from mfdetr_cache.types import GroundTruth

# From this IoU on a detection counts as being of an object, as COCO's loosest threshold has it.
SAME_OBJECT_IOU = 0.5


def box_masks(detections: Detections, original_hw: tuple[int, int]) -> list[dict[str, Any]]:
    """The box itself as mask, the floor: COCO RLE of the pixels whose centre is in each box."""
    boxes = detections.boxes_xyxy.tolist()
    return [encode_mask(_pixels_in_box(box, original_hw, slack=0.0)) for box in boxes]


def ellipse_masks(detections: Detections, original_hw: tuple[int, int]) -> list[dict[str, Any]]:
    """The ellipse inscribed in each box as COCO RLE of the pixels whose centre is inside."""
    x = np.arange(original_hw[1]) + 0.5
    y = np.arange(original_hw[0]) + 0.5
    rles = []
    for x0, y0, x1, y1 in detections.boxes_xyxy.tolist():
        across = (2 * x - x0 - x1) / max(x1 - x0, 1e-9)
        down = (2 * y - y0 - y1) / max(y1 - y0, 1e-9)
        rles.append(encode_mask(across[None] ** 2 + down[:, None] ** 2 <= 1))
    return rles


def oracle_masks(
    detections: Detections,
    truth: GroundTruth,
    label_categories: Sequence[int],
    original_hw: tuple[int, int],
) -> list[dict[str, Any]]:
    """The annotated mask clipped to the predicted box: the ceiling for these detections.

    A detection gets the mask of the object of its category that its box overlaps most, if by an IoU
    of 0.5 or more; any other detection keeps its box. Crowds are no objects, nor are those that
    have a box only. A pixel that the box touches is in the box. ``label_categories`` are the
    category ids of each label, -1 for none; returns the COCO RLE of each detection.
    """
    overlap = box_iou(detections.boxes_xyxy, torch.from_numpy(truth.boxes_xyxy)).numpy()
    masks = {
        index: decode_run_lengths(runs, original_hw)
        for index, runs in enumerate(truth.run_lengths)
        if len(runs)
    }
    rles = []
    for index, box in enumerate(detections.boxes_xyxy.tolist()):
        category_id = label_categories[int(detections.labels[index])]
        same = (truth.category_ids == category_id) & ~truth.is_crowd & truth.has_mask
        candidates = np.where(same, overlap[index], -1.0)
        inside = _pixels_in_box(box, original_hw, slack=0.5)
        if len(candidates) and candidates.max() >= SAME_OBJECT_IOU:
            inside &= masks[int(candidates.argmax())]
        rles.append(encode_mask(inside))
    return rles


def _pixels_in_box(
    box_xyxy: list[float], size_hw: tuple[int, int], slack: float
) -> NDArray[np.bool_]:
    """Pixels whose centre is in the box, or less than ``slack`` pixels outside."""
    x0, y0, x1, y1 = box_xyxy
    x = np.arange(size_hw[1]) + 0.5
    y = np.arange(size_hw[0]) + 0.5
    rows = (y > y0 - slack) & (y < y1 + slack)
    columns = (x > x0 - slack) & (x < x1 + slack)
    inside: NDArray[np.bool_] = rows[:, None] & columns[None]
    return inside
