"""The annotated objects that can be learned from."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.ops.masks import rasterise_in_boxes
from mfdetr_cache.types import GroundTruth


def trainable_objects(truth: GroundTruth, held_out: Sequence[int] = ()) -> NDArray[np.int64]:
    """Objects that can be learned from: no crowd, with mask and area, of a label the detector has.

    Args:
        truth: The annotated objects of an image.
        held_out: Category ids that are hidden.

    Returns:
        Indices into them.
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
    """Coverage of every object that can be learned from over its own box.

    Args:
        truth: The annotated objects of an image.
        size_hw: Height and width of their picture in pixels.
        held_out: Category ids that are hidden.
        side: Cells along both axes.

    Returns:
        Shape (G, side, side).
    """
    objects = trainable_objects(truth, held_out)
    runs = [truth.run_lengths[i] for i in objects]
    boxes = truth.boxes_xyxy[objects].astype(np.float64)
    return rasterise_in_boxes(runs, size_hw, boxes, side)[0]
