"""The annotated objects used for training."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.ops.masks import rasterise_in_boxes
from mfdetr_cache.types import GroundTruth


def trainable_objects(truth: GroundTruth, held_out: Sequence[int] = ()) -> NDArray[np.int64]:
    """Indices of objects with mask, area and a label of the detector; no crowd, not held out.

    ``held_out`` are category ids.
    """
    size = truth.boxes_xyxy[:, 2:] - truth.boxes_xyxy[:, :2]
    usable = ~truth.is_crowd & (truth.labels >= 0) & (truth.areas > 0) & (size > 0).all(axis=1)
    usable &= truth.has_mask
    if held_out:
        usable &= ~np.isin(truth.category_ids, held_out)
    return np.flatnonzero(usable)


def object_masks(
    truth: GroundTruth, size_hw: tuple[int, int], held_out: Sequence[int], side: int
) -> NDArray[np.float32]:
    """Coverage of every trainable object on a grid over its own box, shape (G, side, side)."""
    objects = trainable_objects(truth, held_out)
    runs = [truth.run_lengths[i] for i in objects]
    boxes = truth.boxes_xyxy[objects].astype(np.float64)
    return rasterise_in_boxes(runs, size_hw, boxes, side)[0]
