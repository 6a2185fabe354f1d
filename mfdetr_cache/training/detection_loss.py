"""Box losses for tuning a detector together with a mask network (Table 16).

The losses of Deformable DETR on the final output of any detector. Auxiliary and denoising losses
need branches that do not exist at inference.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from mfdetr_cache.matching.matchers import (
    CLASS_COST,
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    GIOU_COST,
    L1_COST,
    match_hungarian,
)
from mfdetr_cache.ops.boxes import cxcywh_to_xyxy

# DETR's weight of queries that match nothing, in its cross entropy.
_NO_OBJECT_WEIGHT = 0.1


def detection_loss(
    class_logits: Tensor,
    boxes_cxcywh_norm: Tensor,
    labels: Tensor,
    object_cxcywh_norm: Tensor,
    score_function: Literal["sigmoid", "softmax"],
) -> Tensor:
    """The summed loss of one image: classes, L1 and GIoU, matched one to one.

    Of the logits (Q, K) and boxes (Q, 4) of the queries, and the labels (G,) and boxes (G, 4)
    of the annotated objects; a scalar that is not yet divided by their number. With ``softmax``
    the last label is "no object".
    """
    device = class_logits.device
    matches = match_hungarian(
        class_logits.detach().float().cpu().numpy(),
        boxes_cxcywh_norm.detach().float().cpu().numpy(),
        labels.cpu().numpy(),
        object_cxcywh_norm.float().cpu().numpy(),
    )
    queries = torch.from_numpy(matches.query_index).to(device)
    objects = torch.from_numpy(matches.object_index).to(device)
    wanted = labels.to(device)[objects]
    if score_function == "softmax":
        nothing = class_logits.shape[-1] - 1
        target = torch.full((len(class_logits),), nothing, device=device)
        target[queries] = wanted
        weight = class_logits.new_ones(nothing + 1)
        weight[nothing] = _NO_OBJECT_WEIGHT
        # DETR takes the mean over queries; here as a sum per object, like the others.
        classes = functional.cross_entropy(class_logits, target, weight) * max(len(wanted), 1)
    else:
        one_hot = torch.zeros_like(class_logits)
        one_hot[queries, wanted] = 1
        classes = CLASS_COST * sigmoid_focal_loss(
            class_logits, one_hot, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum"
        )
    boxes, target_boxes = boxes_cxcywh_norm[queries], object_cxcywh_norm.to(device)[objects]
    giou = generalized_box_iou_loss(
        cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes), reduction="sum"
    )
    l1 = functional.l1_loss(boxes, target_boxes, reduction="sum")
    total: Tensor = classes + L1_COST * l1 + GIOU_COST * giou
    return total
