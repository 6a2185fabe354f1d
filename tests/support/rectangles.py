"""Masks that are rectangles, and objects with such."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.ops.masks import RunLengths, encode_mask, run_lengths_of_segmentation
from mfdetr_cache.types import GroundTruth

Box = tuple[int, int, int, int]


def runs_of(mask: NDArray[np.bool_]) -> RunLengths:
    return run_lengths_of_segmentation(encode_mask(mask), mask.shape)


def rectangle(size_hw: tuple[int, int], box_xyxy: Box) -> dict[str, Any]:
    """The RLE of a rectangle."""
    x0, y0, x1, y1 = box_xyxy
    mask = np.zeros(size_hw, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return encode_mask(mask)


def rectangles(size_hw: tuple[int, int], *objects: tuple[Box, int, bool]) -> GroundTruth:
    """Objects by box, category and whether they are crowds; labels are the categories from 0 on."""
    boxes, categories, crowds = (np.array(column) for column in zip(*objects, strict=True))
    masks = (rectangle(size_hw, box) for box, _, _ in objects)
    return GroundTruth(
        annotation_ids=np.arange(1, len(objects) + 1),
        category_ids=categories,
        labels=categories - 1,
        boxes_xyxy=boxes.astype(np.float32),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1).astype(float),
        is_crowd=crowds,
        run_lengths=tuple(run_lengths_of_segmentation(m, size_hw) for m in masks),
    )
