"""Which query answers for which annotated object. The detector is frozen, so this never changes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mfdetr_cache.boxes import box_iou

# Costs of Deformable DETR's matcher, which H-DETR, DINO and RT-DETR kept.
CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
# Costs of a pair that differ by less are equal. Computed in float32, as another release may do, a
# cost is a sum of ten terms below 32, each off by up to 32 x 2^-24: 2e-5, twice that between two.
TIE = 4e-5


@dataclass(frozen=True, slots=True)
class Matches:
    """Pairs of a query and an object.

    Attributes:
        query_index: int64, shape (R,).
        object_index: int64, shape (R,).
        iou: IoU of predicted and annotated box, shape (R,).
    """

    query_index: NDArray[np.int64]
    object_index: NDArray[np.int64]
    iou: NDArray[np.float32]


def match_hungarian(
    class_logits: NDArray[np.float32],
    boxes_cxcywh_norm: NDArray[np.float32],
    object_labels: NDArray[np.int64],
    object_cxcywh_norm: NDArray[np.float32],
    preferred: NDArray[np.int64] | None = None,
) -> Matches:
    """One query for each object, as the detectors themselves train (focal class, L1 and GIoU cost).

    Args:
        class_logits: Shape (Q, K).
        boxes_cxcywh_norm: Predicted boxes, shape (Q, 4).
        object_labels: Labels of the objects, all >= 0, shape (G,).
        object_cxcywh_norm: Annotated boxes, shape (G, 4).
        preferred: Queries to choose among where that costs no more than rounding: those a cache
            holds crops for. Matched by another release or on another machine, two queries that
            are as good as each other may have swapped.

    Returns:
        G pairs, or Q if there are fewer queries than objects; by query.
    """
    # Imported late: what never trains does without numba's start.
    from mfdetr_cache.matching_kernels import pair_costs

    class_weights, box_weights = (CLASS_COST, FOCAL_ALPHA, FOCAL_GAMMA), (L1_COST, GIOU_COST)
    cost, iou = pair_costs(
        class_logits,
        boxes_cxcywh_norm,
        object_labels,
        object_cxcywh_norm,
        class_weights,
        box_weights,
    )
    query_index, object_index = linear_sum_assignment(cost)
    if preferred is not None and not np.isin(query_index, preferred).all():
        rows, columns = linear_sum_assignment(cost[preferred])
        extra = cost[preferred][rows, columns].sum() - cost[query_index, object_index].sum()
        if len(columns) == len(object_index) and extra <= TIE * len(columns):
            query_index, object_index = preferred[rows], columns
    found = iou[query_index, object_index].astype(np.float32)
    return Matches(query_index, object_index, found)


def match_by_iou(
    class_logits: Tensor,
    boxes_xyxy_norm: Tensor,
    object_xyxy_norm: Tensor,
    candidates: int,
    min_iou: float,
) -> Matches:
    """Every well-placed query among the most confident ones, with the object it overlaps most.

    This is how Mask R-CNN assigns its proposals: several queries may share an object, and labels
    do not matter.

    Args:
        class_logits: Shape (Q, K).
        boxes_xyxy_norm: Predicted boxes, shape (Q, 4).
        object_xyxy_norm: Annotated boxes, shape (G, 4).
        candidates: How many queries, by best class score, are looked at.
        min_iou: Least IoU of a pair.

    Returns:
        The pairs, by query.
    """
    best = class_logits.max(-1).values.topk(min(candidates, len(class_logits))).indices
    query_index = best.sort().values
    iou = box_iou(boxes_xyxy_norm[query_index], object_xyxy_norm)[0]
    overlap, object_index = iou.max(dim=1)
    keep = (overlap >= min_iou) & (overlap > 0)
    return Matches(query_index[keep].numpy(), object_index[keep].numpy(), overlap[keep].numpy())
