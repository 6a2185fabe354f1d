"""The detector's side of a joint training: its losses on boxes and its optimiser (Table 16)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mfdetr_cache.choices import Tune
from mfdetr_cache.detectors.protocol import Detector, TunableDetector
from mfdetr_cache.errors import ConfigError, TrainingError
from mfdetr_cache.matching.objects import trainable_objects
from mfdetr_cache.ops.boxes import xyxy_to_cxcywh
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.detection_loss import detection_loss
from mfdetr_cache.training.input.live import Picture
from mfdetr_cache.training.optimisers import learning_rate
from mfdetr_cache.types import DetectorOutput

# As Deformable DETR and its descendants are trained.
_CLIP_NORM, _WEIGHT_DECAY = 0.1, 1e-4
# Losses of so many steps are averaged for display.
_RECENT = 50


class DetectorTuner:
    """Moves a part of a detector, or nothing.

    Args:
        detector: On its device.
        tune: What moves.
        train: The head's training settings; schedule and betas are shared.
        share: The detector's learning rate as a share of the head's.

    Attributes:
        num_parameters: How many parameters move.

    Raises:
        ConfigError: If the detector cannot be tuned.
    """

    def __init__(self, detector: Detector, tune: Tune, train: TrainConfig, share: float) -> None:
        self._parameters: list[nn.Parameter] = []
        if tune != "nothing":
            if not isinstance(detector, TunableDetector):
                raise ConfigError(
                    f"{detector.spec.name} cannot be tuned (it has no tunable_parameters); pass "
                    "--tune nothing"
                )
            self._parameters = detector.tunable_parameters(tune)
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self.num_parameters = sum(p.numel() for p in self._parameters)
        self._score_function = detector.spec.score_function
        self._train = train
        self._share = share
        self._losses: list[float] = []
        self._optimiser: torch.optim.AdamW | None = None
        if self._parameters:
            self._optimiser = torch.optim.AdamW(
                self._parameters,
                lr=train.lr,
                weight_decay=_WEIGHT_DECAY,
                betas=(train.beta1, train.beta2),
            )

    def recent_loss(self) -> float:
        """Mean loss of the last steps; 0 where nothing moves."""
        return float(np.mean(self._losses)) if self._losses else 0.0

    def begin(self, outputs: Sequence[DetectorOutput], pictures: Sequence[Picture]) -> None:
        """Gradients of the boxes' losses. The graph stays for the masks' losses.

        Args:
            outputs: One per image.
            pictures: The images.

        Raises:
            TrainingError: If the loss is not finite.
        """
        if self._optimiser is None:
            return
        self._optimiser.zero_grad(set_to_none=True)
        total, count = outputs[0].class_logits.sum() * 0, 0
        for output, picture in zip(outputs, pictures, strict=True):
            objects = trainable_objects(picture.truth)
            count += len(objects)
            height, width = picture.geometry.original_hw
            scale = torch.tensor([width, height, width, height], dtype=torch.float32)
            boxes = torch.from_numpy(picture.truth.boxes_xyxy[objects]) / scale
            total = total + detection_loss(
                output.class_logits[0],
                output.boxes_cxcywh_norm[0],
                torch.from_numpy(picture.truth.labels[objects]),
                xyxy_to_cxcywh(boxes),
                self._score_function,
            )
        loss = total / max(count, 1)
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the detector's loss is {float(loss)}; images "
                f"{[p.image_id for p in pictures]}. Lower --detector-lr, or look at these images"
            )
        loss.backward(retain_graph=True)
        self._losses = [*self._losses[1 - _RECENT :], float(loss.detach())]

    def finish(self, step: int) -> None:
        """Move the detector.

        Args:
            step: Step, counted from 0.
        """
        if self._optimiser is None:
            return
        for group in self._optimiser.param_groups:
            group["lr"] = self._share * learning_rate(self._train, step)
        nn.utils.clip_grad_norm_(self._parameters, _CLIP_NORM)
        self._optimiser.step()

    def state(self) -> dict[str, Any]:
        """What is needed to go on."""
        return {
            "parameters": [p.detach() for p in self._parameters],
            "optimiser": None if self._optimiser is None else self._optimiser.state_dict(),
            "losses": self._losses,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state.

        Args:
            state: From :meth:`state`.
        """
        with torch.no_grad():
            for parameter, value in zip(self._parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        if self._optimiser is not None:
            self._optimiser.load_state_dict(state["optimiser"])
        self._losses = list(state["losses"])
