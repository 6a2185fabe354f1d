"""Scores of masks: Eq. 2 without mask scoring, Eq. 13 with it, and the IoU that a mask expects."""

import torch
from torch import Tensor

# From this probability on a cell is inside a mask.
_INSIDE = 0.5


def mask_confidence(class_scores: Tensor, mask_probs: Tensor) -> Tensor:
    """Class score times the mean probability inside the mask (Eq. 2).

    Class scores c_i are (D,), probabilities (D, H, W), both in [0, 1]. The confidences (D,) are
    between 0 and c_i; 0 for a mask without a cell inside, which Eq. 2 leaves undefined (0/0).
    ValueError if the two disagree on D.

    Examples:
        >>> probs = torch.tensor([[[0.9, 0.7], [0.1, 0.2]]])
        >>> mask_confidence(torch.tensor([0.5]), probs)
        tensor([0.4000])
    """
    if len(class_scores) != len(mask_probs):
        raise ValueError(f"{len(class_scores)} class scores for {len(mask_probs)} masks")
    inside = mask_probs >= _INSIDE
    total = (mask_probs * inside).sum(dim=(1, 2))
    return class_scores * total / inside.sum(dim=(1, 2)).clamp(min=1)


def mask_iou_confidence(class_scores: Tensor, mask_iou: Tensor) -> Tensor:
    """Class score c_i times the predicted mask IoU clipped to [0, 1] (Eq. 13), shape (D,)."""
    return class_scores * torch.clamp(mask_iou, 0, 1)


def expected_iou(mask_probs: Tensor) -> Tensor:
    """The IoU that a mask expects of itself: its probabilities taken as those of the true mask.

    The expected intersection of the cells inside with the true mask, over their expected union with
    it. Probabilities are (D, H, W), IoUs (D,), both in [0, 1]; 0 for a mask without a cell inside.

    Examples:
        >>> expected_iou(torch.tensor([[[0.9, 0.7], [0.4, 0.0]]]))
        tensor([0.6667])
    """
    inside = mask_probs >= _INSIDE
    intersection = (mask_probs * inside).sum(dim=(1, 2))
    union = inside.sum(dim=(1, 2)) + (mask_probs * ~inside).sum(dim=(1, 2))
    return intersection / union.clamp(min=torch.finfo(mask_probs.dtype).tiny)
