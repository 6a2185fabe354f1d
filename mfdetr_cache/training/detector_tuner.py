"""A detector that is trained on with a head (Table 16): its losses on boxes, its optimiser.

The losses of Deformable DETR on the final output of any detector. Auxiliary and denoising losses
need branches that do not exist at inference.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from mfdetr_cache.choices import Tune
from mfdetr_cache.detectors.protocol import Detector, TunableDetector
from mfdetr_cache.errors import ConfigError, TrainingError
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.matching.matchers import (
    CLASS_COST,
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    GIOU_COST,
    L1_COST,
    match_hungarian,
)
from mfdetr_cache.matching.objects import trainable_objects
from mfdetr_cache.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from mfdetr_cache.training.batch import TrainBatch
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.distributed import Processes
from mfdetr_cache.training.input.live import LiveBatch, LiveImage
from mfdetr_cache.training.learner import RECENT, Learner, StepReport
from mfdetr_cache.training.optimisers import learning_rate
from mfdetr_cache.types import DetectorOutput

TUNED: dict[Tune, str] = {
    "nothing": "frozen",
    "encoder-decoder": "tuned but for its backbone",
    "all": "tuned as a whole",
}
# As Deformable DETR and its descendants are trained.
_CLIP_NORM, _WEIGHT_DECAY = 0.1, 1e-4
# DETR's weight of queries that match nothing, in its cross entropy.
_NO_OBJECT_WEIGHT = 0.1


class JointLearner(Learner):
    """A head together with the detector it is trained on, of which a part is trained, or nothing.

    ``lr_ratio`` is the detector's learning rate over the head's; both share schedule and betas.
    ConfigError if the detector cannot be tuned.
    """

    def __init__(
        self,
        head: MaskHead,
        train: TrainConfig,
        detector: Detector,
        tune: Tune,
        lr_ratio: float,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(head, train, processes)
        self._tuned: list[nn.Parameter] = []
        if tune != "nothing":
            if not isinstance(detector, TunableDetector):
                raise ConfigError(
                    f"{detector.spec.name} cannot be tuned (it has no tunable_parameters); pass "
                    "--tune nothing"
                )
            self._tuned = detector.tunable_parameters(tune)
        for parameter in self._tuned:
            parameter.requires_grad_(True)
        self.num_tuned = sum(p.numel() for p in self._tuned)
        self._score_function = detector.spec.score_function
        self._lr_ratio = lr_ratio
        self._box_losses: list[float] = []
        self._box_loss = 0.0
        self._tuner: torch.optim.AdamW | None = None
        if self._tuned:
            betas = (train.beta1, train.beta2)
            self._tuner = torch.optim.AdamW(
                self._tuned, lr=train.lr, weight_decay=_WEIGHT_DECAY, betas=betas
            )

    def recent_box_loss(self) -> float:
        """Mean loss of the detector in the last 50 steps; 0 where nothing of it is trained."""
        return float(np.mean(self._box_losses)) if self._box_losses else 0.0

    def learn(self, batches: Iterable[TrainBatch], first: int, total: int) -> StepReport | None:
        """One step of both, from ``LiveBatch`` micro-batches; see :meth:`Learner.learn`.

        A step without regions still trains the detector, and returns None. TrainingError also if
        the detector's loss is not finite.
        """
        step = self.step
        self._box_loss = 0.0
        if self._tuner is not None:
            self._tuner.zero_grad(set_to_none=True)
        batches = self._with_box_losses(batches)
        if not total:
            batches = list(batches)
        report = super().learn(batches, first, total)
        box_loss = self._update_detector(step)
        return None if report is None else replace(report, box_loss=box_loss)

    def _with_box_losses(self, batches: Iterable[TrainBatch]) -> Iterator[TrainBatch]:
        """The same micro-batches, each yielded after its box losses have been back-propagated."""
        for batch in batches:
            assert isinstance(batch, LiveBatch)
            if self._tuner is not None:
                self._add_box_gradients(batch)
            yield batch

    def _add_box_gradients(self, batch: LiveBatch) -> None:
        """Add those of the mean box loss; the graph is kept for those of the mask losses."""
        total = batch.outputs[0].class_logits.sum() * 0
        for output, image in zip(batch.outputs, batch.images, strict=True):
            total = total + self._loss_of(output, image)
        loss = total / max(batch.num_objects, 1)
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the detector's loss is {float(loss)}; images "
                f"{[image.image_id for image in batch.images]}. Lower --detector-lr, or look at "
                "these images"
            )
        loss.backward(retain_graph=True)
        self._box_loss += float(loss.detach())

    def _loss_of(self, output: DetectorOutput, image: LiveImage) -> Tensor:
        objects = trainable_objects(image.truth)
        height, width = image.geometry.original_hw
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes_xyxy_norm = torch.from_numpy(image.truth.boxes_xyxy[objects]) / scale
        return detection_loss(
            output.class_logits[0],
            output.boxes_cxcywh_norm[0],
            torch.from_numpy(image.truth.labels[objects]),
            xyxy_to_cxcywh(boxes_xyxy_norm),
            self._score_function,
        )

    def _update_detector(self, step: int) -> float | None:
        """Update its weights; returns the loss of the step, None where nothing is trained."""
        if self._tuner is None:
            return None
        loss = self._processes.sum_gradients(
            self._tuned, torch.tensor([self._box_loss], device=self._tuned[0].device)
        )
        for group in self._tuner.param_groups:
            group["lr"] = self._lr_ratio * learning_rate(self.train, step)
        nn.utils.clip_grad_norm_(self._tuned, _CLIP_NORM)
        self._tuner.step()
        self._box_losses = [*self._box_losses[1 - RECENT :], float(loss)]
        return self._box_losses[-1]

    def state(self) -> dict[str, Any]:
        """State of learner and detector, as tensors and plain values."""
        detector = {
            "parameters": [p.detach() for p in self._tuned],
            "optimiser": None if self._tuner is None else self._tuner.state_dict(),
            "losses": self._box_losses,
        }
        return {"learner": super().state(), "tuner": detector}

    def restore(self, state: dict[str, Any]) -> None:
        """Load a state; KeyError, RuntimeError or ValueError if it is of another training."""
        super().restore(state["learner"])
        detector = state["tuner"]
        with torch.no_grad():
            for parameter, value in zip(self._tuned, detector["parameters"], strict=True):
                parameter.copy_(value)
        if self._tuner is not None:
            self._tuner.load_state_dict(detector["optimiser"])
        self._box_losses = list(detector["losses"])


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
