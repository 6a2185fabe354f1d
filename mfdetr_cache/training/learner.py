"""One mask network and everything that training changes about it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mfdetr_cache.errors import TrainingError
from mfdetr_cache.head.batch import HeadBatch, HeadOutput
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.ops.devices import arriving
from mfdetr_cache.training.batch import TrainBatch
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.distributed import Processes
from mfdetr_cache.training.losses import LossParts, head_losses
from mfdetr_cache.training.optimisers import build_optimisers, learning_rate

# Steps that the reported loss is a mean of.
_RECENT = 50


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did.

    Attributes:
        loss: Total loss.
        bce: Its binary cross entropy, unweighted.
        dice: Its dice loss, unweighted.
        scoring: Its mask-IoU loss, unweighted.
        lr: Learning rate.
        regions: Regions trained on, over all processes.
    """

    loss: float
    bce: float
    dice: float
    scoring: float
    lr: float
    regions: int


class Learner:
    """A head, its optimiser, its averaged weights and its place in the training.

    What it computes depends on the batches of each step and on nothing else, so that heads trained
    side by side end with the weights of heads trained alone.

    Args:
        head: The mask network, on its device.
        train: Training settings.
        processes: Those that train it together.

    Attributes:
        step: Steps done.
        images: Images trained on, over all processes.
        seconds: Time of its steps, its part of reading included.
        waiting_seconds: Part of it spent waiting for data.
    """

    def __init__(
        self, head: MaskHead, train: TrainConfig, processes: Processes | None = None
    ) -> None:
        self.head = head
        self.train = train
        self.device = next(head.parameters()).device
        self.step = 0
        self.images = 0
        self.seconds = 0.0
        self.waiting_seconds = 0.0
        self._processes = processes or Processes()
        self._losses: list[float] = []
        self._forward: Callable[[HeadBatch], HeadOutput] = (
            torch.compile(head, dynamic=True) if train.compile else head
        )
        self._optimisers = build_optimisers(head, train)
        # Only float16 needs its gradients scaled; otherwise this passes everything through.
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=train.amp == "fp16")
        self._average = {k: v.detach().clone() for k, v in head.state_dict().items()}

    @property
    def is_done(self) -> bool:
        """Whether its last step is done."""
        return self.step >= self.train.steps

    def recent_loss(self) -> float:
        """Mean total loss of the last steps; not a number before the first."""
        return float(np.mean(self._losses)) if self._losses else float("nan")

    def result_weights(self) -> dict[str, Tensor]:
        """The averaged weights where averaging is on, else the last ones."""
        return self._average if self.train.ema_decay else self.head.state_dict()

    def pass_over(self) -> None:
        """Count a step whose images have no region: there is nothing to learn from."""
        self.step += 1

    def learn(self, pieces: Sequence[TrainBatch], first: int, total: int) -> StepReport:
        """One optimiser step. Nothing has changed when it raises.

        Args:
            pieces: The batches of this process, together its share of the step.
            first: Regions of the step that belong to processes before this one.
            total: Regions of the step over all processes.

        Returns:
            What was done.

        Raises:
            TrainingError: If the loss is not finite, naming the images.
        """
        rate = learning_rate(self.train, self.step)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
        sums = torch.zeros(4, device=self.device)
        known = arriving(sums)
        place = first
        for piece in pieces:
            count = len(piece.labels)
            if not count:
                continue
            losses = loss_of_batch(
                self.head, piece, self.train, self.step, (place, total), self._forward
            )
            place += count
            parts = (losses.total.detach(), losses.bce, losses.dice, losses.scoring)
            sums = sums + torch.stack([p.float() for p in parts])
            # Before the backward pass, so that the GPU is busy with it while the loss is looked at
            # and the next step is prepared.
            known = arriving(sums)
            self._scaler.scale(losses.total).backward()
        if self._processes.world > 1:
            known = arriving(self._processes.sum_gradients(self.head, sums))
        loss, bce, dice, scoring = known()
        if not np.isfinite(loss):
            images = [i for piece in pieces for i in piece.image_ids]
            raise TrainingError(
                f"the loss is {loss} at step {self.step}; images {images}. Lower the learning "
                "rate (--set lr=...), or look at these images"
            )
        for optimiser in self._optimisers:
            self._scaler.unscale_(optimiser)
        if self.train.clip_norm:
            nn.utils.clip_grad_norm_(self.head.parameters(), self.train.clip_norm)
        for optimiser in self._optimisers:
            self._scaler.step(optimiser)
        self._scaler.update()
        self._follow()
        self.step += 1
        self._losses = [*self._losses[1 - _RECENT :], loss]
        return StepReport(loss, bce, dice, scoring, rate, total)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on from here, as tensors and plain values."""
        return {
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "waiting_seconds": self.waiting_seconds,
            "losses": self._losses,
            "head": self.head.state_dict(),
            "average": self._average,
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "scaler": self._scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state.

        Args:
            state: From :meth:`state`.

        Raises:
            KeyError, RuntimeError, ValueError: If it is of another training.
        """
        self.step = int(state["step"])
        self.images = int(state["images"])
        self.seconds = float(state["seconds"])
        self.waiting_seconds = float(state["waiting_seconds"])
        self._losses = list(state["losses"])
        self.head.load_state_dict(state["head"])
        self._average = {k: v.to(self.device) for k, v in state["average"].items()}
        # Checkpoints from before there was a choice have one.
        states = state.get("optimisers") or [state["optimiser"]]
        for optimiser, values in zip(self._optimisers, states, strict=True):
            optimiser.load_state_dict(values)
        self._scaler.load_state_dict(state["scaler"])

    def _follow(self) -> None:
        """Move the averaged weights; early on they follow faster, so that they start in place."""
        if not self.train.ema_decay:
            return
        decay = min(self.train.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.head.state_dict().items():
                if value.dtype.is_floating_point:
                    self._average[name].lerp_(value, 1 - decay)


def build_learner(
    config: TrainConfig,
    make_head: Callable[[], MaskHead],
    device: torch.device,
    processes: Processes | None = None,
) -> Learner:
    """A learner whose initial weights depend on the seed alone.

    Args:
        config: Training settings.
        make_head: Builds the head.
        device: Where it trains.
        processes: Those that train it together.

    Returns:
        The learner.

    Raises:
        TrainingError: If the head has nothing to train.
    """
    torch.manual_seed(config.seed)
    head = make_head().to(device)
    if not any(True for _ in head.parameters()):
        raise TrainingError("this head has no parameter to train; measure it with mfdetr ablate")
    return Learner(head, config, processes)


def loss_of_batch(
    head: MaskHead,
    batch: TrainBatch,
    train: TrainConfig,
    step: int,
    share: tuple[int, int] | None = None,
    forward: Callable[[HeadBatch], HeadOutput] | None = None,
) -> LossParts:
    """The losses of one step or of a piece of it; the points depend on seed and step alone.

    Args:
        head: The mask network.
        batch: From a cache, or from a live detector.
        train: Training settings.
        step: Step, counted from 0.
        share: Where the batch's regions stand in a step that is computed in pieces.
        forward: What to call in place of the head, such as its compiled form.

    Returns:
        The losses.
    """
    generator = torch.Generator(batch.masks.device)
    generator.manual_seed(train.seed * 1_000_003 + step)
    with autocast(train.amp, batch.masks.device):
        # A compiled module has no truth value of its own.
        output = (head if forward is None else forward)(batch.inputs)
    return head_losses(
        output, batch.masks, batch.labels, batch.outside, train, generator, share, head.codec
    )


_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(
    amp: Literal["off", "bf16", "fp16"], device: torch.device
) -> AbstractContextManager[object]:
    """The context a network runs in.

    Args:
        amp: Precision asked for.
        device: Where it runs.

    Returns:
        torch's autocast, or nothing.
    """
    if amp == "off":
        return nullcontext()
    return torch.autocast(device.type, _TYPES[amp])
