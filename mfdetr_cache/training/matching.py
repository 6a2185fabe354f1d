"""Which query answers for which annotated object. The detector is frozen, so this never changes."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mfdetr_cache.boxes import box_iou, generalized_box_iou

# Costs of Deformable DETR's matcher, which H-DETR, DINO and RT-DETR kept.
CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


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
    class_logits: Tensor,
    boxes_xyxy_norm: Tensor,
    boxes_cxcywh_norm: Tensor,
    object_labels: Tensor,
    object_xyxy_norm: Tensor,
    object_cxcywh_norm: Tensor,
) -> Matches:
    """One query for each object, as the detectors themselves train (focal class, L1 and GIoU cost).

    Args:
        class_logits: Shape (Q, K).
        boxes_xyxy_norm: Predicted boxes, shape (Q, 4).
        boxes_cxcywh_norm: The same as centre and size.
        object_labels: Labels of the objects, all >= 0, shape (G,).
        object_xyxy_norm: Annotated boxes, shape (G, 4).
        object_cxcywh_norm: The same as centre and size.

    Returns:
        G pairs, or Q if there are fewer queries than objects.
    """
    probability = class_logits.sigmoid()[:, object_labels]
    negative = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -(1 - probability + 1e-8).log()
    positive = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * -(probability + 1e-8).log()
    l1 = torch.cdist(boxes_cxcywh_norm, object_cxcywh_norm, p=1)
    giou = generalized_box_iou(boxes_xyxy_norm, object_xyxy_norm)
    cost = CLASS_COST * (positive - negative) + L1_COST * l1 - GIOU_COST * giou
    query_index, object_index = linear_sum_assignment(cost.numpy())
    iou = box_iou(boxes_xyxy_norm, object_xyxy_norm)[0].numpy()[query_index, object_index]
    return Matches(query_index, object_index, iou)


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
