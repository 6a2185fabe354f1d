"""Train a mask network from a cache; the detector is never built."""

import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.devices import torch_device
from mfdetr_cache.errors import ConfigError, HeadError, StoppedError, TrainingError
from mfdetr_cache.head.folder import save_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_cache.protocols import Reporter
from mfdetr_cache.training.batches import (
    TrainBatch,
    TrainSample,
    collate,
    read_ahead,
    rows_of_step,
    steps_per_epoch,
    view_of_epoch,
)
from mfdetr_cache.training.checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.losses import LossParts, head_losses
from mfdetr_cache.training.memory import keep_freed_memory
from mfdetr_cache.training.precision import autocast
from mfdetr_cache.training.regions import build_regions, trainable_objects
from mfdetr_cache.training.schedule import learning_rate
from mfdetr_pipelines.evaluate import EvaluateSummary, measure
from mfdetr_pipelines.run_folder import TrainHeadConfig, log_line, prepare_folder, run_document

_LOG_EVERY = 10


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What a training did.

    Attributes:
        out: Run folder.
        parameters: Trained parameters of the head.
        steps: Optimiser steps done in all.
        epochs: The same in epochs.
        seconds: Time of the training steps, over all runs of a resumed training.
        waiting_seconds: Part of it spent waiting for data.
        images_per_second: Images trained on per second.
        loss: Mean total loss of the last steps.
        validation: Metrics on the validation cache, where one was given.
    """

    out: str
    parameters: int
    steps: int
    epochs: float
    seconds: float
    waiting_seconds: float
    images_per_second: float
    loss: float
    validation: EvaluateSummary | None


def run_train_head(config: TrainHeadConfig, reporter: Reporter) -> TrainSummary:
    """Train a head, or go on with one.

    Args:
        config: What to do.
        reporter: Who is told about progress.

    Returns:
        What was done.

    Raises:
        CacheError: If a cache is missing, unfinished or damaged.
        IdentityError: If the two caches come from different detectors.
        HeadError: If the run folder is taken, or there is nothing to resume.
        TrainingError: If there is nothing to learn from, or the loss is not finite.
        StoppedError: If a signal ended it early; the run can be resumed.
    """
    cache = FeatureCache.open(config.cache)
    cache.require_complete()
    validation = _open_validation(config, cache)
    train = _settled(config, cache)
    device = torch_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
        if train.amp == "fp16":
            raise ConfigError("amp=fp16 needs a GPU; on a CPU use amp=bf16 or amp=off")
    torch.manual_seed(train.seed)
    head = MaskHead(config.recipe.head, cache.spec).to(device)
    parameters = sum(p.numel() for p in head.parameters())
    _require_c1(cache, head, train)
    document = run_document(config, train, cache, validation)
    training = _Training(config, train, cache, head, device, reporter)
    prepare_folder(config, document)
    if config.resume and (config.out / CHECKPOINT_FILE).is_file():
        training.restore(load_checkpoint(config.out))
    if not parameters:
        raise TrainingError("this head has no parameter to train; measure it with mfdetr ablate")
    reporter.say(
        f"recipe {config.recipe.name}: {parameters / 1e6:.2f} M parameters, {train.steps} steps of "
        f"{train.batch_size} images ({training.epochs_of(train.steps):.1f} epochs of "
        f"{len(training.rows)} images with objects)"
    )
    training.run()
    save_head(config.out, training.result_weights())
    measured = None
    if validation is not None:
        head.load_state_dict(training.result_weights())
        measured, _ = measure(validation, head, device, reporter, baselines=False)
        log_line(config.out, {"step": training.step, "validation": _metrics_of(measured)})
    return TrainSummary(
        out=str(config.out),
        parameters=parameters,
        steps=training.step,
        epochs=training.epochs_of(training.step),
        seconds=training.seconds,
        waiting_seconds=training.waiting_seconds,
        images_per_second=training.images / max(training.seconds, 1e-9),
        loss=training.recent_loss(),
        validation=measured,
    )


def loss_of_batch(head: MaskHead, batch: TrainBatch, train: TrainConfig, step: int) -> LossParts:
    """The losses of one step; the points depend on seed and step alone.

    Args:
        head: The mask network.
        batch: From a cache, or from a live detector.
        train: Training settings.
        step: Step, counted from 0.

    Returns:
        The losses.
    """
    generator = torch.Generator(batch.masks.device)
    generator.manual_seed(train.seed * 1_000_003 + step)
    with autocast(train.amp, batch.masks.device):
        output = head(batch.inputs)
    return head_losses(output, batch.masks, batch.labels, batch.outside, train, generator)


def parameter_groups(head: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay.

    Args:
        head: The mask network.
        weight_decay: For matrices; vectors and tables have none.

    Returns:
        Groups for an optimiser.
    """
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in head.named_parameters():
        table = name.endswith(("position", "level_embed", "position_bias"))
        (plain if parameter.ndim < 2 or table else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _require_c1(cache: FeatureCache, head: MaskHead, train: TrainConfig) -> None:
    """Refuse settings that need more of C1 than the cache holds, before anything is begun."""
    layout = cache.layout
    if head.c1 is None or layout.c1 == "full":
        return
    if layout.c1 == "none":
        raise ConfigError(f"{cache.path} was extracted with --c1 none: pass --set use_c1=false")
    assert layout.c1_roi is not None
    fixed = {
        "match": (train.match, "hungarian"),
        "gt_box_share": (train.gt_box_share, 0.0),
        "box_jitter": (train.box_jitter, 0.0),
        "roi_size": (head.config.roi_size, layout.c1_roi.roi_size),
        "roi_sampling_ratio": (head.config.roi_sampling_ratio, layout.c1_roi.sampling_ratio),
    }
    wrong = [f"{name}={held}" for name, (asked, held) in fixed.items() if asked != held]
    if wrong:
        raise ConfigError(
            f"{cache.path} holds C1 as crops (--c1 roi), which fix some settings: pass "
            + " ".join(f"--set {w}" for w in wrong)
        )


def _open_validation(config: TrainHeadConfig, cache: FeatureCache) -> FeatureCache | None:
    if config.val_cache is None:
        return None
    validation = FeatureCache.open(config.val_cache)
    require_same(
        detector_identity(cache.spec),
        f"--cache {cache.path}",
        detector_identity(validation.spec),
        f"--val-cache {validation.path}",
    )
    validation.require_complete()
    if config.recipe.head.use_c1:
        validation.require_c1_map("validation")
    return validation


def _settled(config: TrainHeadConfig, cache: FeatureCache) -> TrainConfig:
    """The recipe's training settings with the length the user asked for."""
    train = config.recipe.train
    if config.epochs is not None and config.max_steps is not None:
        raise ConfigError("give --epochs or --max-steps, not both")
    if config.max_steps is not None:
        if config.max_steps < 1:
            raise ConfigError(f"--max-steps must be 1 or more, not {config.max_steps}")
        return dataclasses.replace(train, steps=config.max_steps)
    if config.epochs is not None:
        if config.epochs <= 0:
            raise ConfigError(f"--epochs must be above 0, not {config.epochs}")
        per_epoch = steps_per_epoch(len(_trainable_rows(cache)), train.batch_size)
        return dataclasses.replace(train, steps=max(1, round(config.epochs * per_epoch)))
    return train


def _trainable_rows(cache: FeatureCache) -> list[int]:
    rows = [row for row in cache.rows if len(trainable_objects(cache.ground_truth(row)))]
    if not rows:
        raise TrainingError(
            f"no image of {cache.path} has an object to learn from (only crowds, categories the "
            "detector does not know, or nothing); extract a split with instance masks"
        )
    return rows


def _metrics_of(measured: EvaluateSummary) -> dict[str, object]:
    return {"mask": measured.mask.to_dict(), "box": measured.box.to_dict()}


@dataclass
class _Training:
    """The loop and everything it changes."""

    config: TrainHeadConfig
    train: TrainConfig
    cache: FeatureCache
    head: MaskHead
    device: torch.device
    reporter: Reporter
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    _losses: list[float] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.rows = _trainable_rows(self.cache)
        layout = self.cache.layout
        self.views = layout.views if self.train.views == "all" else layout.views[:1]
        self.optimiser = torch.optim.AdamW(
            parameter_groups(self.head, self.train.weight_decay),
            lr=self.train.lr,
            betas=(self.train.beta1, self.train.beta2),
        )
        # Only float16 needs its gradients scaled; otherwise this passes everything through.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.train.amp == "fp16")
        self.average = {k: v.detach().clone() for k, v in self.head.state_dict().items()}

    def epochs_of(self, steps: int) -> float:
        """How many epochs some steps are."""
        return steps / steps_per_epoch(len(self.rows), self.train.batch_size)

    def recent_loss(self) -> float:
        """Mean total loss of the last steps."""
        return float(np.mean(self._losses[-50:])) if self._losses else float("nan")

    def result_weights(self) -> dict[str, Tensor]:
        """The averaged weights where averaging is on, else the last ones."""
        return self.average if self.train.ema_decay else self.head.state_dict()

    def run(self) -> None:
        """Train until the last step, or until a signal asks to stop."""
        self.head.train()
        self.reporter.start("train", self.train.steps, "steps", done=self.step)
        last_saved = time.monotonic()
        with self._signals():
            batches = self._batches()
            while self.step < self.train.steps and not self._stop.is_set():
                started = time.perf_counter()
                samples = next(batches)
                ready = time.perf_counter()
                self._step(collate(samples, self.head.map_names, self.device))
                ended = time.perf_counter()
                self.waiting_seconds += ready - started
                self.seconds += ended - started
                self.images += len(samples)
                if time.monotonic() - last_saved > 60 * self.train.checkpoint_minutes:
                    self.save()
                    last_saved = time.monotonic()
            batches.close()
        self.reporter.finish()
        self.save()
        if self._stop.is_set():
            raise StoppedError(
                f"stopped by a signal at step {self.step}; go on with the same command and --resume"
            )

    def _batches(self) -> Any:  # noqa: ANN401  a generator, closed by hand
        train = self.train
        return read_ahead(
            self._load,
            lambda step: rows_of_step(self.rows, train.batch_size, train.seed, step),
            range(self.step, train.steps),
            train.num_threads,
        )

    def _load(self, row: int, step: int) -> TrainSample:
        epoch = step // steps_per_epoch(len(self.rows), self.train.batch_size)
        view = view_of_epoch(self.views, self.train.seed, row, epoch)
        image = self.cache.read(row, self.head.map_names, view)
        random = np.random.default_rng((self.train.seed, step, row))
        regions = build_regions(image, self.train, self.config.recipe.head.roi_size, random)
        return TrainSample(image, regions)

    def _step(self, batch: TrainBatch) -> None:
        if not len(batch.labels):
            # No query answers for any object of these images: nothing to learn here.
            self.step += 1
            self.reporter.advance()
            return
        rate = learning_rate(self.train, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        losses = loss_of_batch(self.head, batch, self.train, self.step)
        total = float(losses.total.detach())
        if not np.isfinite(total):
            self.save()
            raise TrainingError(
                f"the loss is {total} at step {self.step}; images {list(batch.image_ids)}. Lower "
                "the learning rate (--set lr=...), or look at these images"
            )
        self.scaler.scale(losses.total).backward()
        self.scaler.unscale_(self.optimiser)
        if self.train.clip_norm:
            nn.utils.clip_grad_norm_(self.head.parameters(), self.train.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self._follow()
        self.step += 1
        self._losses.append(total)
        note = (
            f"loss {self.recent_loss():.3f} (bce {float(losses.bce):.3f}, dice "
            f"{float(losses.dice):.3f}, iou {float(losses.scoring):.3f})"
        )
        self.reporter.advance(note=note)
        if self.step % _LOG_EVERY == 0 or self.step == self.train.steps:
            line = {
                "step": self.step,
                "lr": rate,
                "loss": total,
                "bce": float(losses.bce),
                "dice": float(losses.dice),
                "scoring": float(losses.scoring),
                "regions": len(batch.labels),
                "seconds": round(self.seconds, 3),
                "waiting_seconds": round(self.waiting_seconds, 3),
            }
            log_line(self.config.out, line)

    def _follow(self) -> None:
        """Move the averaged weights; early on they follow faster, so that they start in place."""
        if not self.train.ema_decay:
            return
        decay = min(self.train.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.head.state_dict().items():
                if value.dtype.is_floating_point:
                    self.average[name].lerp_(value, 1 - decay)

    def save(self) -> None:
        """Write a checkpoint."""
        save_checkpoint(
            self.config.out,
            {
                "step": self.step,
                "images": self.images,
                "seconds": self.seconds,
                "waiting_seconds": self.waiting_seconds,
                "losses": self._losses[-50:],
                "head": self.head.state_dict(),
                "average": self.average,
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint.

        Args:
            state: What :meth:`save` wrote.
        """
        try:
            self.step = int(state["step"])
            self.images = int(state["images"])
            self.seconds = float(state["seconds"])
            self.waiting_seconds = float(state["waiting_seconds"])
            self._losses = list(state["losses"])
            self.head.load_state_dict(state["head"])
            self.average = {k: v.to(self.device) for k, v in state["average"].items()}
            self.optimiser.load_state_dict(state["optimiser"])
            self.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            where = self.config.out / CHECKPOINT_FILE
            raise HeadError(f"{where} does not fit this run ({error})") from error

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM and Ctrl-C end the step that is running and then save."""

        def ask_to_stop(_number: int, _frame: FrameType | None) -> None:
            self._stop.set()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
