"""Train a mask network from a cache; the detector is never built."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.config import nearest
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.evaluation.measure import EvaluateSummary, measure
from mfdetr_cache.head.folder import save_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_cache.ops.devices import keep_freed_memory, torch_device
from mfdetr_cache.reporter import Reporter, SilentReporter
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.distributed import Processes, training_processes
from mfdetr_cache.training.initial_head import new_head
from mfdetr_cache.training.learner import Learner, build_learner
from mfdetr_cache.training.loop import Run, TrainingLoop
from mfdetr_cache.training.order import steps_per_epoch
from mfdetr_cache.training.rows import trainable_rows
from mfdetr_cache.training.run_folder import TrainHeadConfig, prepare_folder, run_document
from mfdetr_cache.training.run_log import RunLog, read_log, require_trackers


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
        best_AP: Best mask AP of a validation on the way, where there was one.
        best_step: Step it was seen at.
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
    best_AP: float | None
    best_step: int | None


def run_train_head(config: TrainHeadConfig, reporter: Reporter) -> TrainSummary:
    """Train a head, or go on with one; under ``torchrun``, together with the other processes.

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
    require_trackers(config.track)
    train = settled(config, cache)
    device = training_device(config.device, train.amp)
    with training_processes(device) as processes:
        if not processes.is_first:
            reporter = SilentReporter()
        learner = build_learner(
            train, lambda: new_head(config.recipe.head, cache, train), device, processes
        )
        require_c1(cache, learner.head, train)
        document = run_document(config, train, cache, validation)
        if processes.is_first:
            prepare_folder(config.out, config.recipe.head, document, resume=config.resume)
        processes.wait()
        log = RunLog(config.out, config.track if processes.is_first else (), document["train"])
        run = Run(learner, config.out, log)
        loop = TrainingLoop(
            cache,
            [run],
            device,
            reporter,
            processes,
            split_when_full=config.batch_size == "auto",
        )
        if config.resume:
            run.restore()
        validator = None
        if validation is not None:
            validator = _Validator(config, validation, run, processes)
            run.after_step = validator.after_step
        parameters = sum(p.numel() for p in learner.head.parameters())
        reporter.say(
            f"recipe {config.recipe.name}: {parameters / 1e6:.2f} M parameters, {train.steps} "
            f"steps of {train.batch_size} images ({loop.epochs_of(train.steps):.1f} epochs of "
            f"{len(loop.rows)} images with objects)"
        )
        loop.run()
        if run.problem is not None:
            raise run.problem
        measured = None
        if processes.is_first:
            save_head(config.out, learner.result_weights())
            if validator is not None:
                measured = validator.finish(reporter)
        log.close()
        processes.wait()
    return TrainSummary(
        out=str(config.out),
        parameters=parameters,
        steps=learner.step,
        epochs=loop.epochs_of(learner.step),
        seconds=learner.seconds,
        waiting_seconds=learner.waiting_seconds,
        images_per_second=learner.images / max(learner.seconds, 1e-9),
        loss=learner.recent_loss(),
        validation=measured,
        best_AP=None if validator is None else validator.best_ap,
        best_step=None if validator is None else validator.best_step,
    )


def training_device(name: str, amp: Literal["off", "bf16", "fp16"]) -> torch.device:
    """Where a training runs, prepared for it.

    Args:
        name: As for ``--device``.
        amp: Precision asked for.

    Returns:
        The device.

    Raises:
        ConfigError: If there is no such device, or it cannot do what was asked for.
    """
    device = torch_device(name)
    keep_freed_memory()
    if device.type == "cpu" and amp == "fp16":
        raise ConfigError("amp=fp16 needs a GPU; on a CPU use amp=bf16 or amp=off")
    return device


def require_c1(cache: FeatureCache, head: MaskHead, train: TrainConfig) -> None:
    """Refuse settings that need more of C1 than the cache holds, before anything is begun.

    Args:
        cache: Cache of the training split.
        head: The head.
        train: Training settings.

    Raises:
        ConfigError: Saying which settings the cache fixes.
    """
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


def settled(config: TrainHeadConfig, cache: FeatureCache) -> TrainConfig:
    """The recipe's training settings with the length and the batch size the user asked for.

    Args:
        config: What the user asked for.
        cache: Cache of the training split.

    Returns:
        The settings.

    Raises:
        ConfigError: If they contradict one another.
    """
    train = config.recipe.train
    if isinstance(config.batch_size, int):
        if config.batch_size < 1:
            raise ConfigError(f"--batch-size must be 1 or more, not {config.batch_size}")
        train = dataclasses.replace(train, batch_size=config.batch_size)
    if config.hold_out:
        ids = category_ids(config.hold_out, cache.categories)
        train = dataclasses.replace(train, held_out=ids)
    if config.epochs is None:
        return with_length(train, None, config.max_steps, 0)
    rows = trainable_rows(cache, train)
    return with_length(train, config.epochs, config.max_steps, len(rows))


def with_length(
    train: TrainConfig, epochs: float | None, max_steps: int | None, num_rows: int
) -> TrainConfig:
    """Training settings with the length the user asked for.

    Args:
        train: The recipe's.
        epochs: As typed; None if it was not.
        max_steps: The same.
        num_rows: Images of an epoch; only looked at for epochs.

    Returns:
        The settings.

    Raises:
        ConfigError: If both are given, or one is nothing.
    """
    if epochs is not None and max_steps is not None:
        raise ConfigError("give --epochs or --max-steps, not both")
    if max_steps is not None:
        if max_steps < 1:
            raise ConfigError(f"--max-steps must be 1 or more, not {max_steps}")
        return dataclasses.replace(train, steps=max_steps)
    if epochs is not None:
        if epochs <= 0:
            raise ConfigError(f"--epochs must be above 0, not {epochs}")
        per_epoch = steps_per_epoch(num_rows, train.batch_size)
        return dataclasses.replace(train, steps=max(1, round(epochs * per_epoch)))
    return train


def category_ids(names: Sequence[str], categories: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """Ids of categories given by name or id.

    Args:
        names: As typed.
        categories: ``{"id", "name"}`` of the dataset.

    Returns:
        Ids in rising order.

    Raises:
        ConfigError: If one is unknown.
    """
    by_name = {str(c["name"]).lower(): int(c["id"]) for c in categories}
    known = set(by_name.values())
    found = set()
    for name in names:
        plain = name.strip().lower()
        number = int(plain) if plain.isdigit() else by_name.get(plain)
        if number not in known:
            raise ConfigError(f"--hold-out {name}: no such category{nearest(plain, list(by_name))}")
        found.add(number)
    return tuple(sorted(found))


def _open_validation(config: TrainHeadConfig, cache: FeatureCache) -> FeatureCache | None:
    split = config.recipe.train.val_split
    if config.val_every is not None and config.val_every < 1:
        raise ConfigError(f"--val-every must be 1 or more, not {config.val_every}")
    if config.val_cache is None and split:
        if config.recipe.head.use_c1:
            cache.require_c1_map("validation")
        return cache.split(split)[1]
    if config.val_cache is None:
        if config.val_every is not None:
            raise ConfigError("--val-every needs --val-cache, or --set val_split=N")
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


class _Validator:
    """Measures a head on the way and at the end; keeps the best weights seen.

    Args:
        config: What the user asked for.
        cache: Cache of the validation split.
        run: The run that is measured.
        processes: Those that train together; the first one measures, the others wait.
    """

    def __init__(
        self, config: TrainHeadConfig, cache: FeatureCache, run: Run, processes: Processes
    ) -> None:
        self.best_ap: float | None = None
        self.best_step: int | None = None
        self._config = config
        self._cache = cache
        self._run = run
        self._processes = processes
        self._last: float | None = None
        if config.resume:
            self._remember()

    def after_step(self) -> str:
        """Measure where it is time to; what to show beside the progress."""
        learner, every = self._run.learner, self._config.val_every
        if every is not None and learner.step % every == 0 and not learner.is_done:
            if self._processes.is_first:
                self._measure(learner, SilentReporter())
            self._processes.wait()
        return "" if self._last is None else f", val AP {100 * self._last:.1f}"

    def finish(self, reporter: Reporter) -> EvaluateSummary:
        """Measure the final weights.

        Args:
            reporter: Who is told about progress.

        Returns:
            The metrics.
        """
        return self._measure(self._run.learner, reporter)

    def _remember(self) -> None:
        """The best validation before the run was stopped, from its log."""
        for line in read_log(self._config.out):
            # A validation later than the checkpoint is made again.
            if "validation" in line and line["step"] <= self._run.learner.step:
                ap = float(line["validation"]["mask"]["AP"])
                self._last = ap
                if self.best_ap is None or ap > self.best_ap:
                    self.best_ap, self.best_step = ap, int(line["step"])

    def _measure(self, learner: Learner, reporter: Reporter) -> EvaluateSummary:
        head, weights = learner.head, learner.result_weights()
        current = {k: v.clone() for k, v in head.state_dict().items()}
        head.load_state_dict(weights)
        try:
            found, _ = measure(self._cache, head, learner.device, reporter)
        finally:
            head.load_state_dict(current)
            head.train()
        self._last = found.mask.AP
        if self.best_ap is None or self.best_ap < found.mask.AP:
            self.best_ap, self.best_step = found.mask.AP, learner.step
            save_head(self._config.out, weights, which="best")
        assert self._run.log is not None
        self._run.log.add({"step": learner.step, "validation": _metrics_of(found)})
        return found


def _metrics_of(measured: EvaluateSummary) -> dict[str, Any]:
    return {"mask": measured.mask.to_dict(), "box": measured.box.to_dict()}
