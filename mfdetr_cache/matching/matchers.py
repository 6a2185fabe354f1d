"""Assignment of queries to annotated objects. The detector is frozen, so this never changes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mfdetr_cache.matching.objects import trainable_objects
from mfdetr_cache.ops.boxes import box_iou
from mfdetr_cache.types import ABSENT_LOGIT, GroundTruth

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

    Logits are (Q, K), boxes (Q, 4) and (G, 4), labels (G,), none below 0. ``preferred`` are the
    queries whose crops a cache holds: they are chosen wherever the cost differs by rounding alone,
    since another release or machine may swap two queries of equal cost. min(G, Q) pairs, sorted by
    query; absent queries are in none and do not count.
    """
    present = np.flatnonzero((class_logits > ABSENT_LOGIT).any(axis=1))
    if len(present) < len(class_logits):
        held = None if preferred is None else np.flatnonzero(np.isin(present, preferred))
        of_present = class_logits[present], boxes_cxcywh_norm[present]
        matches = match_hungarian(*of_present, object_labels, object_cxcywh_norm, held)
        return Matches(present[matches.query_index], matches.object_index, matches.iou)
    # Imported late: what never trains does without numba's start.
    from mfdetr_cache.matching.pair_costs_numba import pair_costs

    weights = (CLASS_COST, FOCAL_ALPHA, FOCAL_GAMMA), (L1_COST, GIOU_COST)
    cost, iou = pair_costs(
        class_logits, boxes_cxcywh_norm, object_labels, object_cxcywh_norm, *weights
    )
    query_index, object_index = linear_sum_assignment(cost)
    if preferred is not None and not np.isin(query_index, preferred).all():
        rows, columns = linear_sum_assignment(cost[preferred])
        extra = cost[preferred][rows, columns].sum() - cost[query_index, object_index].sum()
        if len(columns) == len(object_index) and extra <= TIE * len(columns):
            query_index, object_index = preferred[rows], columns
    return Matches(query_index, object_index, iou[query_index, object_index].astype(np.float32))


def focal_cost(class_logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Class cost of Deformable DETR's matcher, unweighted, for logits of the objects' labels."""
    with np.errstate(over="ignore"):
        probability = 1 / (1 + np.exp(-class_logits.astype(np.float64)))
    wrong = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -np.log(1 - probability + 1e-8)
    right = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * -np.log(probability + 1e-8)
    cost: NDArray[np.float32] = (right - wrong).astype(np.float32)
    return cost


def match_by_iou(
    class_logits: Tensor,
    boxes_xyxy_norm: Tensor,
    object_xyxy_norm: Tensor,
    candidates: int,
    min_iou: float,
) -> Matches:
    """Pairs each confident query that overlaps an object with the object of highest IoU.

    Several queries may share an object and labels do not matter, as for Mask R-CNN's proposals. Of
    logits (Q, K) and boxes (Q, 4) and (G, 4); only the ``candidates`` queries of best class score
    are considered. The pairs are sorted by query.
    """
    score, best = class_logits.max(-1).values.topk(min(candidates, len(class_logits)))
    query_index = best[score > ABSENT_LOGIT].sort().values
    iou = box_iou(boxes_xyxy_norm[query_index], object_xyxy_norm)
    overlap, object_index = iou.max(dim=1)
    keep = (overlap >= min_iou) & (overlap > 0)
    return Matches(query_index[keep].numpy(), object_index[keep].numpy(), overlap[keep].numpy())


# A box thinner than this is no region: its RoI would be one sample repeated.
_MIN_SIDE_NORM = 1e-4


def hungarian_queries(
    class_logits: Tensor,
    boxes_cxcywh_norm: Tensor,
    truth: GroundTruth,
    original_hw: tuple[int, int],
) -> NDArray[np.int64]:
    """Sorted indices of the queries Hungarian matching selects in one image; C1 is cropped there.

    Logits (Q, K), boxes (Q, 4); ``original_hw`` in pixels.
    """
    objects = trainable_objects(truth)
    if not len(objects):
        return np.zeros(0, dtype=np.int64)
    height, width = original_hw
    scale = np.array([width, height, width, height], dtype=np.float32)
    target = truth.boxes_xyxy[objects] / scale
    logits, boxes = class_logits.numpy(), boxes_cxcywh_norm.numpy()
    return match_one_to_one(logits, boxes, truth.labels[objects], target).query_index


def match_one_to_one(
    class_logits: NDArray[np.float32],
    boxes_cxcywh: NDArray[np.float32],
    labels: NDArray[np.int64],
    truth_xyxy: NDArray[np.float32],
    preferred: NDArray[np.int64] | None = None,
) -> Matches:
    """:func:`match_hungarian` for annotated boxes given as normalised corners, shape (G, 4)."""
    low, high = truth_xyxy[:, :2], truth_xyxy[:, 2:]
    truth = np.concatenate(((low + high) / 2, high - low), axis=1)
    return match_hungarian(class_logits, boxes_cxcywh, labels, truth, preferred)


def with_least_side(boxes_xyxy_norm: NDArray[np.float32]) -> NDArray[np.float32]:
    """Boxes (R, 4) no thinner than ``_MIN_SIDE_NORM``; degenerate ones widen right and down."""
    corner = boxes_xyxy_norm[:, :2]
    far = np.maximum(boxes_xyxy_norm[:, 2:], corner + np.float32(_MIN_SIDE_NORM))
    return np.concatenate((corner, far), axis=1)
