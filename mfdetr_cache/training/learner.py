"""A mask network with its optimiser and averaged weights, updated step by step."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mfdetr_cache.errors import TrainingError
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.ops.devices import start_copy_to_host
from mfdetr_cache.training.batch import TrainBatch
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.distributed import Processes
from mfdetr_cache.training.losses import LossParts, head_losses
from mfdetr_cache.training.optimisers import build_optimisers, learning_rate
from mfdetr_cache.training.regions import RegionSettings
from mfdetr_cache.training.set_loss import set_losses

# Steps that a reported loss is a mean of.
RECENT = 50


@dataclass(frozen=True, slots=True)
class StepReport:
    """Numbers of one step; parts of the loss are those of :class:`LossParts`.

    ``regions`` are those trained on, over all processes; ``box_loss`` is the detector's, None where
    it is frozen.
    """

    lr: float
    loss: float
    bce: float
    dice: float
    scoring: float
    regions: int
    box_loss: float | None = None


class Learner:
    """A head, its optimiser, its averaged weights, and the progress of its training.

    Results depend on the batches of each step alone, so heads trained side by side end with the
    weights of heads trained alone. TrainingError if a head without RoIAlign would get several
    images in a micro-batch.

    ``step`` and ``images`` count over all processes; ``seconds`` is the time of the steps with this
    head's share of reading, ``waiting_seconds`` the part of it spent waiting for data.
    """

    def __init__(
        self, head: MaskHead, train: TrainConfig, processes: Processes | None = None
    ) -> None:
        if not head.config.roialign and train.accumulate < train.batch_size:
            raise TrainingError(
                "roialign=false compares queries with one image at a time; pass --set accumulate="
                f"{train.batch_size}, a micro-batch for each image of a step"
            )
        if (head.config.mask_predictor == "refined") != (train.match == "set"):
            raise TrainingError(
                "mask_predictor=refined and match=set go together: objects are matched to what its "
                "stages make of the boxes; pass both or neither"
            )
        self.head = head
        self.train = train
        self.device = next(head.parameters()).device
        self.regions = RegionSettings.of(train, head.config)
        self.step = 0
        self.images = 0
        self.seconds = 0.0
        self.waiting_seconds = 0.0
        self._processes = processes or Processes()
        self._losses: list[float] = []
        # Compiled, it has the head's attributes too.
        self._network: Any = torch.compile(head, dynamic=True) if train.compile else head
        self._optimisers = build_optimisers(head, train)
        # Only float16 needs its gradients scaled; otherwise this passes everything through.
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=train.amp == "fp16")
        self._average = {k: v.detach().clone() for k, v in head.state_dict().items()}

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.train.steps

    @property
    def images_per_second(self) -> float:
        """Mean over the training."""
        return self.images / max(self.seconds, 1e-9)

    @property
    def has_learned(self) -> bool:
        """Whether a step had a region."""
        return bool(self._losses)

    def recent_loss(self, steps: int = RECENT) -> float:
        """Mean total loss of the last steps, at most 50; NaN before the first."""
        return float(np.mean(self._losses[-steps:])) if self._losses else float("nan")

    def result_weights(self) -> dict[str, Tensor]:
        """The averaged weights if averaging is on, else the current ones."""
        return self._average if self.train.ema_decay else self.head.state_dict()

    def learn(self, batches: Iterable[TrainBatch], first: int, total: int) -> StepReport | None:
        """One optimiser step; if it raises, no weight has changed.

        ``batches`` are this process's micro-batches; ``first`` is the number of regions of the step
        in processes of lower rank, ``total`` over all. A step without regions is only counted, and
        returns None. TrainingError, which names the images, if the loss is not finite.
        """
        if not total:
            self.step += 1
            return None
        rate = learning_rate(self.train, self.step)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
        loss, bce, dice, scoring = self._add_gradients(batches, first, total)
        for optimiser in self._optimisers:
            self._scaler.unscale_(optimiser)
        if self.train.clip_norm:
            nn.utils.clip_grad_norm_(self.head.parameters(), self.train.clip_norm)
        for optimiser in self._optimisers:
            self._scaler.step(optimiser)
        self._scaler.update()
        self._average_weights()
        self.step += 1
        self._losses = [*self._losses[1 - RECENT :], loss]
        return StepReport(rate, loss, bce, dice, scoring, total)

    def _add_gradients(self, batches: Iterable[TrainBatch], first: int, total: int) -> list[float]:
        """Accumulate the gradients of a step; returns its loss, BCE, dice and scoring."""
        sums = torch.zeros(4, device=self.device)
        known = start_copy_to_host(sums)
        image_ids: list[int] = []
        for batch in batches:
            image_ids += batch.image_ids
            count = len(batch.inputs.queries)
            if not count:
                continue
            losses = loss_of_batch(self._network, batch, self.train, self.step, (first, total))
            first += count
            parts = (losses.total.detach(), losses.bce, losses.dice, losses.scoring)
            sums = sums + torch.stack([p.float() for p in parts])
            # Before the backward pass, so that the GPU is busy with it while the loss is looked at
            # and the next step is prepared.
            known = start_copy_to_host(sums)
            self._scaler.scale(losses.total).backward()
        if self._processes.world > 1:
            known = start_copy_to_host(self._processes.sum_gradients(self.head.parameters(), sums))
        total_loss, *parts_of_it = known()
        if not np.isfinite(total_loss):
            raise TrainingError(
                f"the loss is {total_loss} at step {self.step}; images {image_ids}. Lower the "
                "learning rate (--set lr=...), or look at these images"
            )
        return [total_loss, *parts_of_it]

    def state(self) -> dict[str, Any]:
        """The complete training state, as tensors and plain values."""
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
        """Load a state; KeyError, RuntimeError or ValueError if it is of another training."""
        self.step = int(state["step"])
        if not 0 <= self.step <= self.train.steps:
            raise ValueError(f"step {self.step} of {self.train.steps}")
        self.images = int(state["images"])
        self.seconds = float(state["seconds"])
        self.waiting_seconds = float(state["waiting_seconds"])
        self._losses = list(state["losses"])
        self.head.load_state_dict(state["head"])
        self._average = {k: v.to(self.device) for k, v in state["average"].items()}
        for optimiser, values in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        self._scaler.load_state_dict(state["scaler"])

    def _average_weights(self) -> None:
        """Update the moving average; its decay rises over the first steps."""
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
    """A learner with a :func:`seeded_head`."""
    return Learner(seeded_head(config.seed, make_head, device), config, processes)


def seeded_head(seed: int, make_head: Callable[[], MaskHead], device: torch.device) -> MaskHead:
    """A head whose initial weights depend on the seed alone, not on the device."""
    torch.manual_seed(seed)
    head = make_head().to(device)
    if not any(True for _ in head.parameters()):
        raise TrainingError("this head has no parameter to train; measure it with mfdetr ablate")
    return head


def loss_of_batch(
    head: MaskHead,
    batch: TrainBatch,
    train: TrainConfig,
    step: int,
    share: tuple[int, int] | None = None,
) -> LossParts:
    """The losses of a micro-batch; sampled points depend on seed and step alone.

    ``share`` is the number of regions of the step before this batch, and in all; None if the batch
    is the whole step.
    """
    generator = torch.Generator(batch.masks.device)
    generator.manual_seed(train.seed * 1_000_003 + step)
    with autocast(train.amp, batch.masks.device):
        output = head(batch.inputs)
    if output.stages:
        assert batch.inputs.counts is not None
        assert head.codec is not None
        of_step = None if share is None else share[1]
        counts = batch.inputs.counts
        return set_losses(
            output.stages, counts, batch.objects, batch.masks, head.codec, train, of_step
        )
    return head_losses(
        output, batch.masks, batch.labels, batch.outside, train, generator, share, head.codec
    )


_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(
    amp: Literal["off", "bf16", "fp16"], device: torch.device
) -> AbstractContextManager[object]:
    """A context in which a network runs in mixed precision; without effect for ``off``."""
    if amp == "off":
        return nullcontext()
    return torch.autocast(device.type, _TYPES[amp])
