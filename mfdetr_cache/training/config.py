"""Settings of a training."""

import os
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from mfdetr_cache.errors import ConfigError
from mfdetr_cache.ops.cores import threads_beside_gpu
from mfdetr_cache.options import Option

# The least that a number may be, where that is not 0.
_LEAST = {"steps": 1, "batch_size": 1, "target_scale": 1, "accumulate": 1, "num_processes": -1}
_SHARES = ("ema_decay", "min_match_iou", "gt_box_share", "importance_sample_ratio")
# Settings that a run that failed may go on with otherwise.
RESCUE_FIELDS = ("lr", "clip_norm", "amp")


@dataclass(frozen=True, slots=True)
class Length:
    """Length of the training.

    Attributes:
        max_steps: Train for N steps; the schedule is fitted to them.
        epochs: Train for N epochs; the schedule is fitted to them.
    """

    max_steps: int | None = None
    epochs: Annotated[float | None, Option(metavar="N")] = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.max_steps is not None:
            raise ConfigError("give --epochs or --max-steps, not both")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"--max-steps must be 1 or more, not {self.max_steps}")
        if self.epochs is not None and self.epochs <= 0:
            raise ConfigError(f"--epochs must be above 0, not {self.epochs}")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Training settings. The defaults are the paper's (section 4.1) where it states them.

    Attributes:
        steps: Optimiser steps; the paper's 88,500 are six epochs of COCO at batch 8.
        batch_size: Images per step.
        optimiser: ``adamw`` as in the paper, or ``muon``: Muon for the matrices and AdamW for the
            rest, which takes fewer steps.
        lr: Peak learning rate.
        warmup_steps: Steps of linear warm-up.
        schedule: ``step`` drops the rate by ten at each of ``drops``; ``cosine`` falls to zero.
        drops: Fractions of training at which the rate drops.
        weight_decay: On matrices; biases, norms and embeddings have none.
        beta1: Of AdamW.
        beta2: Of AdamW.
        clip_norm: Largest gradient norm; 0 for no clipping.
        ema_decay: Decay of an exponential moving average of the weights, used as the result; 0 for
            none.
        views: ``all`` views of the cache are walked through, ``base`` alone, or the first so many,
            of which ``base`` is one.
        match: ``hungarian`` as the detectors train (one query per object), or ``iou``: every query
            among the best ``iou_candidates`` whose box overlaps an object enough, its best one.
            ``set`` for heads that move boxes: the best ``iou_candidates`` are all trained, and the
            loss matches what each stage makes of them, one to one, with a cost of mask codes.
        min_match_iou: Matches whose predicted box overlaps the object less are not trained on.
        iou_candidates: How many queries, by class score, ``iou`` matching looks at.
        max_regions: At most so many regions per image, drawn at random; 0 for no limit.
        gt_box_share: Share of regions that get the object's own box instead of the predicted one.
        box_jitter: Largest shift of each box side, as a share of the box's size.
        points: ``sampled`` as PointRend does (Table 6), or ``grid`` for every cell.
        num_points: Points per mask; 0 takes a quarter of the grid's cells.
        oversample_ratio: Candidates per point.
        importance_sample_ratio: Share of points taken where the mask is least certain.
        target_scale: Cells of the target grid per cell of the mask, along an axis.
        bce_weight: Weight of the binary cross entropy.
        dice_weight: Weight of the dice loss.
        coarse_weight: Weight of these two losses of the coarse mask too, where the head has a finer
            grid.
        scoring_weight: Weight of the mask-IoU regression.
        embedding_weight: Weight of the distance between predicted and annotated mask codes, where
            the head predicts codes.
        embedding_loss: That distance: one minus the cosine, or the mean squared difference.
        amp: Compute the network in bfloat16 or float16 where that is safe; losses, norms and
            sampling positions stay in float32. ``fp16`` needs a GPU.
        accumulate: Compute each step in so many pieces, for less memory; the gradient stays that of
            the whole step.
        compile: Compile the network with torch.compile; the first steps then take minutes.
        shuffle: ``images`` in any order, or ``parts``: some parts of the cache at a time, their
            images mixed, for disks and networks that read neighbours faster.
        label_fraction: Train on the masks of only this part of the images.
        held_out: Category ids whose masks are hidden from training, to see how masks of classes
            come out that the head never saw (its masks do not depend on the class).
        val_split: Leave every so-many-th image of the cache out of training, to measure on when
            settings are chosen; 0 leaves none out.
        seed: Of initialisation, order, jitter and points.
        num_threads: Threads that read and prepare batches; 0 for two, or half of the cores up to
            eight beside a GPU.
        num_processes: Processes that do this in place of the threads and leave the GIL to the
            training; 0 for none, -1 for half of the cores up to eight beside a GPU. Threads read
            until they have started.
        checkpoint_minutes: Time between checkpoints.
    """

    steps: int = 88_500
    batch_size: int = 8
    optimiser: Literal["adamw", "muon"] = "adamw"
    lr: float = 1.5e-4
    warmup_steps: int = 0
    schedule: Literal["step", "cosine"] = "step"
    drops: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 5e-5
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 0.1
    ema_decay: float = 0.0
    views: str = "all"
    match: Literal["hungarian", "iou", "set"] = "hungarian"
    min_match_iou: float = 0.0
    iou_candidates: int = 100
    max_regions: int = 0
    gt_box_share: float = 0.0
    box_jitter: float = 0.0
    points: Literal["sampled", "grid"] = "sampled"
    num_points: int = 0
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    target_scale: int = 2
    bce_weight: float = 5.0
    dice_weight: float = 5.0
    coarse_weight: float = 0.0
    scoring_weight: float = 1.0
    embedding_weight: float = 2.0
    embedding_loss: Literal["cosine", "l2"] = "cosine"
    amp: Literal["off", "bf16", "fp16"] = "off"
    accumulate: int = 1
    compile: bool = False
    shuffle: Literal["images", "parts"] = "images"
    label_fraction: float = 1.0
    held_out: tuple[int, ...] = ()
    val_split: int = 0
    seed: int = 0
    num_threads: int = 0
    num_processes: int = -1
    checkpoint_minutes: float = 5.0

    def reader_threads(self, *, on_gpu: bool) -> int:
        """``num_threads``; if 0, two, or half of the cores up to eight beside a GPU."""
        if self.num_threads or not on_gpu:
            return self.num_threads or 2
        return max(2, threads_beside_gpu(8))

    def reader_processes(self, *, on_gpu: bool) -> int:
        """``num_processes``; if -1, half of the cores up to eight beside a GPU, else 0.

        A GPU training makes a thousand short calls per step and loses a third of its time to
        threads that hold the GIL in between. 0 means threads: on a CPU, off Linux, where
        ``num_threads`` is set, and where half of the cores is one.
        """
        if self.num_processes >= 0:
            return self.num_processes
        if not on_gpu or self.num_threads or not hasattr(os, "memfd_create"):
            return 0
        count = threads_beside_gpu(8)
        return count if count > 1 else 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = _LEAST.get(name, 0)
            if isinstance(value, int | float) and value < least:
                said = f"be {least} or more" if least else "not be negative"
                raise ValueError(f"{name} must {said}")
            if name in _SHARES and value > 1:
                raise ValueError(f"{name} must be within 0 and 1")
        if self.val_split == 1:
            raise ValueError("val_split must be 0, or 2 or more")
        if self.lr <= 0 or self.oversample_ratio < 1:
            raise ValueError("lr must be above 0 and oversample_ratio 1 or more")
        if self.views not in ("all", "base") and not (self.views.isdecimal() and int(self.views)):
            raise ValueError(f"views must be all, base or a number from 1 on, not {self.views!r}")
        if self.beta1 >= 1 or self.beta2 >= 1:
            raise ValueError("beta1 and beta2 must be below 1")
        if not 0 < self.label_fraction <= 1:
            raise ValueError("label_fraction must be above 0 and at most 1")
        if self.box_jitter >= 0.5:
            raise ValueError("box_jitter must be within 0 and 0.5")
