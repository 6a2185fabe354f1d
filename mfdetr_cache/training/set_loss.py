"""ISTR's set loss (Hu et al., 2021, arXiv 2105.00637): objects matched anew after every stage."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional
from torchvision.ops import generalized_box_iou, generalized_box_iou_loss

from mfdetr_cache.head.batch import RefinedRegions
from mfdetr_cache.head.mask_embedding import MaskCodec
from mfdetr_cache.matching.matchers import CLASS_COST, GIOU_COST, L1_COST
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.losses import LossParts, code_distance, dice_loss
from mfdetr_cache.training.regions import SetTargets

# Of the cosine of mask codes, brought to [0, 1].
MASK_COST = 2.0


def set_losses(
    stages: Sequence[RefinedRegions],
    counts: Sequence[int],
    objects: Sequence[SetTargets],
    masks: Tensor,
    codec: MaskCodec,
    config: TrainConfig,
    share: int | None = None,
) -> LossParts:
    """The losses of all stages: boxes (L1, GIoU), mask codes, and dice of the decoded masks.

    Classes are the frozen detector's and have a cost but no loss. ``stages`` have the boxes and
    codes of the R regions, ``counts`` the regions of each image, ``objects`` those of each image
    that has some; ``masks`` are the coverage of all objects over their boxes, shape (G, 28, 28),
    which ``codec`` encodes. Losses are divided by ``share``, the regions of the whole step; None if
    these are all. ``dice`` is that of the last stage; ``bce`` and ``scoring`` are 0.
    """
    device = masks.device
    codes = codec.encode(masks)
    regions = [count for count in counts if count]
    sizes = [len(o.boxes_xyxy_norm) for o in objects]
    per_image = list(zip(objects, codes.split(sizes), strict=True))
    scale = torch.cat(
        [
            masks.new_tensor([*o.resized_hw[::-1]] * 2).expand(count, 4)
            for o, count in zip(objects, regions, strict=True)
        ]
    )
    truth = torch.from_numpy(np.concatenate([o.boxes_xyxy_norm for o in objects])).to(device)
    zero = masks.new_zeros(())
    total = dice = zero
    for stage in stages:
        boxes = stage.boxes_xyxy.float() / scale
        found = stage.codes.float()
        parts = zip(boxes.detach().split(regions), found.detach().split(regions), strict=True)
        pairs = [match_set(*part, *image) for part, image in zip(parts, per_image, strict=True)]
        region, wanted = _joined(pairs, regions, sizes)
        region, wanted = region.to(device), wanted.to(device)
        decoded = codec.decode(found[region]).flatten(1).sigmoid()
        dice = dice_loss(decoded, masks[wanted].flatten(1)).sum()
        total = total + (
            L1_COST * functional.l1_loss(boxes[region], truth[wanted], reduction="sum")
            + GIOU_COST * generalized_box_iou_loss(boxes[region], truth[wanted], reduction="sum")
            + config.embedding_weight
            * code_distance(found[region], codes[wanted], config.embedding_loss).sum()
            + config.dice_weight * dice
        )
    count = share or sum(regions)
    return LossParts(total / count, zero, dice.detach() / count, zero)


def match_set(
    boxes_xyxy_norm: Tensor, codes: Tensor, objects: SetTargets, object_codes: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Regions and objects of one image, one to one: costs of class, L1, GIoU and cosine of codes.

    Boxes (R, 4) and codes (R, K) of the regions, codes (G, K) of the objects; min(R, G) pairs.
    """
    truth = torch.from_numpy(objects.boxes_xyxy_norm).to(boxes_xyxy_norm)
    likeness = functional.normalize(codes, dim=-1) @ functional.normalize(object_codes, dim=-1).T
    cost = (
        L1_COST * torch.cdist(boxes_xyxy_norm, truth, p=1)
        - GIOU_COST * generalized_box_iou(boxes_xyxy_norm, truth)
        - MASK_COST * (likeness + 1) / 2
    )
    summed = cost.cpu().numpy() + CLASS_COST * objects.class_cost
    region, wanted = linear_sum_assignment(summed)
    return region, wanted


def _joined(
    pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    regions: Sequence[int],
    objects: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Pairs of single images as indices among the regions and objects of all."""
    first_region = np.cumsum([0, *regions[:-1]])
    first_object = np.cumsum([0, *objects[:-1]])
    region = [r + first for (r, _), first in zip(pairs, first_region, strict=True)]
    wanted = [o + first for (_, o), first in zip(pairs, first_object, strict=True)]
    return torch.from_numpy(np.concatenate(region)), torch.from_numpy(np.concatenate(wanted))
