"""Losses of the mask network: cross entropy and dice on points, and mask-IoU regression.

Points are PointRend's: many candidates, the least certain kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mfdetr_cache.head.batch import HeadOutput
from mfdetr_cache.head.mask_embedding import MaskCodec
from mfdetr_cache.ops.points import bilinear_at
from mfdetr_cache.training.config import TrainConfig


@dataclass(frozen=True, slots=True)
class LossParts:
    """The losses of one batch, each a scalar; only ``total`` is weighted.

    Attributes:
        total: Weighted sum, which is minimised.
        bce: Binary cross entropy, mean over points and regions.
        dice: Dice loss, mean over regions.
        scoring: Squared error of the predicted mask IoU, mean over regions; 0 for regions without a
            score target.
    """

    total: Tensor
    bce: Tensor
    dice: Tensor
    scoring: Tensor


def dice_loss(probabilities: Tensor, targets: Tensor) -> Tensor:
    """One minus the dice coefficient, smoothed by 1, of two tensors in [0, 1]: (R, N) to (R,)."""
    overlap = 2 * (probabilities * targets).sum(-1)
    return 1 - (overlap + 1) / (probabilities.sum(-1) + targets.sum(-1) + 1)


def code_distance(codes: Tensor, wanted: Tensor, kind: Literal["cosine", "l2"]) -> Tensor:
    """Distance (R,) of mask codes (R, K): one minus the cosine, or the mean squared difference."""
    if kind == "l2":
        return (codes - wanted).square().mean(-1)
    return 1 - functional.cosine_similarity(codes, wanted, dim=-1)


def mask_iou_targets(mask_logits: Tensor, masks: Tensor, outside: Tensor) -> Tensor:
    """IoU of each predicted mask with its object, including the object's part outside the box.

    Of logits (R, r, r), the object's coverage of the box (R, t, t), t a multiple of r, and its area
    outside over the box's, (R,). In [0, 1], shape (R,); 0 for an empty prediction.
    """
    side = int(mask_logits.shape[-1])
    predicted = (mask_logits >= 0).to(masks.dtype)
    covered = functional.adaptive_avg_pool2d(masks[:, None], side)[:, 0]
    overlap = (predicted * covered).mean(dim=(1, 2))
    union = predicted.mean(dim=(1, 2)) + covered.mean(dim=(1, 2)) + outside - overlap
    return overlap / union.clamp(min=1e-6)


def head_losses(
    output: HeadOutput,
    masks: Tensor,
    labels: Tensor,
    outside: Tensor,
    config: TrainConfig,
    generator: torch.Generator,
    share: tuple[int, int] | None = None,
    codec: MaskCodec | None = None,
) -> LossParts:
    """The losses of R > 0 regions; ValueError for none.

    ``masks``, ``labels`` and ``outside`` are those of a ``TrainBatch``. ``share`` is the index of
    the first region within its step, and the number of regions of the step: means are then over the
    step, so that losses and gradients of micro-batches add up. ``codec`` encodes the annotated
    masks where the output has codes.
    """
    logits = output.mask_logits.float()
    if not len(logits):
        raise ValueError("a batch without regions has no loss")
    bce, dice = _mask_losses(logits, masks, config, generator, share)
    total = config.bce_weight * bce + config.dice_weight * dice
    if output.refine is not None:
        # The coarse mask and its refined points count alike (PointRend, section 3.4).
        points = _mask_losses(logits, masks, config, generator, share, output.refine)
        total = total + config.bce_weight * points[0] + config.dice_weight * points[1]
    if output.coarse_logits is not None and config.coarse_weight:
        coarse = _mask_losses(output.coarse_logits.float(), masks, config, generator, share)
        weighted = config.bce_weight * coarse[0] + config.dice_weight * coarse[1]
        total = total + config.coarse_weight * weighted
    count = len(logits) if share is None else share[1]
    scoring = logits.new_zeros(())
    if output.mask_iou is not None:
        target = mask_iou_targets(logits.detach(), masks, outside)
        # Only masks that hit their object say something about quality (Mask Scoring R-CNN).
        scored = (target > 0) & (labels >= 0)
        guess = output.mask_iou.float().gather(1, labels.clamp(min=0)[:, None])[:, 0]
        scoring = ((guess - target) ** 2 * scored).sum() / count
    total = total + config.scoring_weight * scoring
    if output.codes is not None and codec is not None:
        apart = code_distance(output.codes.float(), codec.encode(masks), config.embedding_loss)
        total = total + config.embedding_weight * apart.sum() / count
    return LossParts(total, bce.detach(), dice.detach(), scoring.detach())


def _mask_losses(
    logits: Tensor,
    masks: Tensor,
    config: TrainConfig,
    generator: torch.Generator,
    share: tuple[int, int] | None,
    refine: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy and dice of mask logits, in the terms of :func:`head_losses`.

    With ``refine``, of what it gives for points (R, N, 2) where these logits are least certain.
    """
    if config.points == "grid" and refine is None:
        height, width = logits.shape[1:]
        predicted = logits.flatten(1)
        wanted = functional.adaptive_avg_pool2d(masks[:, None], (height, width)).flatten(1)
    else:
        points = uncertain_points(
            logits,
            config.num_points or logits[0].numel() // 4,
            config.oversample_ratio,
            config.importance_sample_ratio,
            generator,
            share,
        )
        predicted = sample_at(logits, points) if refine is None else refine(points)
        wanted = sample_at(masks, points)
    count = len(logits) if share is None else share[1]
    bce = functional.binary_cross_entropy_with_logits(predicted, wanted, reduction="sum")
    return bce / (count * predicted.shape[1]), dice_loss(predicted.sigmoid(), wanted).sum() / count


def sample_at(grids: Tensor, points: Tensor) -> Tensor:
    """Bilinear values (R, N) of grids (R, h, w) at points (R, N, 2), as :func:`bilinear_at`."""
    return bilinear_at(grids[:, None], points)[:, 0]


def uncertain_points(
    mask_logits: Tensor,
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
    generator: torch.Generator,
    share: tuple[int, int] | None = None,
) -> Tensor:
    """Points where a mask is least certain, filled up with uniform ones (section 3.5).

    x and y in [0, 1], shape (R, N, 2), for mask logits (R, h, w): N from ``oversample_ratio`` * N
    uniform candidates (k of the paper), a share of ``importance_sample_ratio`` (beta) of them the
    least certain. ``share`` is that of :func:`head_losses`: micro-batches draw the points of the
    whole step.
    """
    count, device = len(mask_logits), mask_logits.device
    first, total = (0, count) if share is None else share

    def uniform_points(number: int) -> Tensor:
        drawn = torch.rand(total, number, 2, generator=generator, device=device)
        return drawn[first : first + count]

    candidates = uniform_points(int(num_points * oversample_ratio))
    num_important = int(num_points * importance_sample_ratio)
    uncertainty = -sample_at(mask_logits.detach().float(), candidates).abs()
    best = uncertainty.topk(num_important, dim=1).indices
    important = torch.take_along_dim(candidates, best[..., None], dim=1)
    return torch.cat((important, uniform_points(num_points - num_important)), dim=1)
