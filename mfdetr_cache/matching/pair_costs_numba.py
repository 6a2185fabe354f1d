"""Matching costs of all pairs of a query and an object, compiled by numba.

A reader's threads match while others decode: one call without the GIL in place of thirty small
operations that hold it in turn. Computed in float64 for any input dtype.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.ops.numba_compile import compiled

Boxes = NDArray[np.floating[Any]]


@compiled()
def overlaps(first: Boxes, second: Boxes) -> tuple[Any, Any]:
    """IoU in [0, 1] and GIoU in [-1, 1] (Rezatofighi et al., 2019) of two cxcywh boxes, shape (4,).

    0 where a denominator is zero.
    """
    intersection, hull = 1.0, 1.0
    for axis in range(2):
        a, a_size = float(first[axis]), max(float(first[axis + 2]), 0.0)
        b, b_size = float(second[axis]), max(float(second[axis + 2]), 0.0)
        low = max(a - a_size / 2, b - b_size / 2)
        high = min(a + a_size / 2, b + b_size / 2)
        intersection *= max(high - low, 0.0)
        hull *= max(a + a_size / 2, b + b_size / 2) - min(a - a_size / 2, b - b_size / 2)
    area = max(float(first[2]), 0.0) * max(float(first[3]), 0.0)
    union = area + max(float(second[2]), 0.0) * max(float(second[3]), 0.0) - intersection
    iou = intersection / union if union > 0 else 0.0
    return iou, (iou - (hull - union) / hull if hull > 0 else iou)


@compiled()
def pair_costs(
    class_logits: NDArray[np.floating[Any]],
    boxes_cxcywh: Boxes,
    labels: NDArray[np.int64],
    objects_cxcywh: Boxes,
    class_weights: tuple[float, float, float],
    box_weights: tuple[float, float],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Deformable DETR's matching cost (focal class, L1 and GIoU) and IoU of every pair, (Q, G).

    Logits are (Q, K), labels (G,), boxes (Q, 4) and (G, 4) in one unit. ``class_weights`` are the
    weight of the class cost, alpha and gamma of the focal loss; ``box_weights`` those of L1 and of
    generalised IoU.
    """
    weight, alpha, gamma = class_weights
    cost = np.empty((len(boxes_cxcywh), len(labels)))
    iou = np.empty(cost.shape)
    for q in range(cost.shape[0]):
        for g in range(cost.shape[1]):
            p = 1 / (1 + math.exp(-float(class_logits[q, labels[g]])))
            positive = alpha * (1 - p) ** gamma * -math.log(p + 1e-8)
            negative = (1 - alpha) * p**gamma * -math.log(1 - p + 1e-8)
            l1 = 0.0
            for i in range(4):
                l1 += abs(float(boxes_cxcywh[q, i]) - float(objects_cxcywh[g, i]))
            iou[q, g], giou = overlaps(boxes_cxcywh[q], objects_cxcywh[g])
            cost[q, g] = weight * (positive - negative) + box_weights[0] * l1
            cost[q, g] -= box_weights[1] * giou
    return cost, iou
