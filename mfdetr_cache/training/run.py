"""A training with its run folder: learner, checkpoints, log and validation."""

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.choices import Tracker
from mfdetr_cache.errors import HeadError, OutputError, TrainingError
from mfdetr_cache.head.folder import RunRecord, run_of_folder, save_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.reporter import Reporter, SilentReporter
from mfdetr_cache.training.distributed import Processes
from mfdetr_cache.training.learner import Learner, StepReport
from mfdetr_cache.training.run_folder import (
    BEFORE_FILE,
    CHECKPOINT_FILE,
    FAILED_FILE,
    SAME_FIELDS,
    keep_checkpoint,
    load_checkpoint,
    prepare_folder,
    save_checkpoint,
)
from mfdetr_cache.training.run_log import RunLog, read_log

if TYPE_CHECKING:
    # A training that measures nothing needs none of what measuring imports.
    from mfdetr_cache.evaluation.measure import EvaluateSummary

_LOG_EVERY = 10
# Parts of the loss, and what they are called beside the bar.
_LOSSES = {"bce": "bce", "dice": "dice", "scoring": "iou", "box_loss": "boxes"}
# A loss that is so many times the lowest one has grown; over so few steps, to notice it early.
_GROWN, _FEW_STEPS = 1.5, 10


@dataclass(frozen=True, slots=True)
class Validation:
    """How a run is measured.

    Attributes:
        every: Steps between measurements; None measures at the end only.
        patience: Measurements in a row without a better AP that end the run; None for no end.
        keeps_best: Save the weights with the best AP.
        measured_on: Which images and objects; measurements of others are no better or worse.
    """

    measure: "Callable[[MaskHead, Reporter], EvaluateSummary]"
    every: int | None = None
    patience: int | None = None
    keeps_best: bool = True
    measured_on: str = ""

    @classmethod
    def on_cache(
        cls,
        cache: FeatureCache,
        device: torch.device,
        every: int | None = None,
        patience: int | None = None,
    ) -> "Validation":
        """Measure on a cache of the same detector, every ``every`` steps and at the end."""
        from mfdetr_cache.evaluation.measure import measure

        return cls(
            lambda head, reporter: measure(cache, head, device, reporter)[0],
            every,
            patience,
            measured_on=f"{cache.cache_id} {cache.annotations.annotations_id}",
        )


class Run:
    """A training with its folder; with ``resume``, at the folder's checkpoint if there is one.

    With ``midway`` the head can be used at every checkpoint, also if the run is stopped there.
    Without a folder nothing is written. HeadError if the checkpoint is damaged or of another run.
    ``problem`` is the error that ended it early, if any; ``best_ap`` the best mask AP measured,
    also before a resume, at ``best_step``; ``has_settled`` whether it did not become better for the
    validation's ``patience``.
    """

    def __init__(
        self,
        learner: Learner,
        folder: Path | None = None,
        log: RunLog | None = None,
        validation: Validation | None = None,
        *,
        resume: bool = False,
        midway: bool = True,
    ) -> None:
        self.learner = learner
        self._midway = midway
        self.problem: TrainingError | None = None
        self.best_ap: float | None = None
        self.best_step: int | None = None
        self.has_settled = False
        self._since_best = 0
        self._log = log
        self._last_ap: float | None = None
        self._saved_step: int | None = None
        # Of the checkpoints; a mean over 50 steps.
        self._lowest_loss = math.inf
        self._folder = folder
        self._name = "" if folder is None else run_of_folder(folder)
        self._validation = validation
        if resume:
            self._restore()

    @property
    def is_active(self) -> bool:
        """Whether it has steps left, has not failed and can still become better."""
        return self.problem is None and not self.learner.is_done and not self.has_settled

    def save(self) -> str:
        """Write a checkpoint; OutputError if the disk is full, with the old one kept.

        Weights that are not finite end the run instead. Returns a warning, or nothing.
        """
        warning = ""
        if not all(bool(w.isfinite().all()) for w in self.learner.head.state_dict().values()):
            self.fail(TrainingError(f"the weights are not finite after step {self.learner.step}"))
        elif self._folder is not None:
            warning = self._keep_before_growth(self._folder)
            save_checkpoint(self._folder, self._state())
            if self._midway:
                self.save_weights()
            self._saved_step = self.learner.step
            (self._folder / FAILED_FILE).unlink(missing_ok=True)
        return warning

    def _state(self) -> dict[str, Any]:
        """The learner's, and which run it is of."""
        return {**self.learner.state(), "run": self._name}

    def _keep_before_growth(self, folder: Path) -> str:
        """Keep the last checkpoint from before the loss grew, until it has fallen again.

        Such weights are finite and may be lost all the same.
        """
        before, now = folder / BEFORE_FILE, self.learner.recent_loss(_FEW_STEPS)
        if not now > _GROWN * self._lowest_loss:
            before.unlink(missing_ok=True)
            self._lowest_loss = min(self._lowest_loss, self.learner.recent_loss())
        elif self._saved_step is not None and not before.is_file():
            keep_checkpoint(folder)
            return (
                f"the loss was {self._lowest_loss:.3g} and is {now:.3g} at step "
                f"{self.learner.step}; {before} is the checkpoint of step {self._saved_step}. To "
                f"go back to it, copy it over {CHECKPOINT_FILE} and --resume, also with another "
                "lr, clip_norm or amp"
            )
        return ""

    def save_weights(self) -> None:
        """Write the head as it is at this step; a settled one is at its end."""
        assert self._folder is not None
        step = None if self.has_settled else self.learner.step
        save_head(self._folder, self.learner.result_weights(), step=step)

    def fail(self, error: TrainingError) -> None:
        """End the run: the checkpoint from before is kept, the state now lies beside it."""
        kept = "no checkpoint was written yet: --resume begins again"
        if self._saved_step is not None:
            kept = f"the checkpoint of step {self._saved_step} is kept: --resume goes on from it"
        if self._folder is not None:
            error = TrainingError(f"{error}; {kept}, also with another lr, clip_norm or amp")
            with contextlib.suppress(OutputError):
                save_checkpoint(self._folder, self._state(), FAILED_FILE)
        self.problem = error

    def add_to_log(self, report: StepReport) -> None:
        """Log every tenth step, and the last one."""
        learner = self.learner
        if self._log is None or (learner.step % _LOG_EVERY and not learner.is_done):
            return
        self._log.add(
            {
                "step": learner.step,
                **{name: value for name, value in asdict(report).items() if value is not None},
                "seconds": round(learner.seconds, 3),
                "waiting_seconds": round(learner.waiting_seconds, 3),
            }
        )

    def note(self, report: StepReport | None) -> str:
        """Text beside the progress bar: speed, losses and AP, or the error."""
        learner = self.learner
        if self.problem is not None:
            return str(self.problem)
        # The most telling first: a narrow terminal shows the beginning.
        parts = [] if report is None else [f"loss {learner.recent_loss():.3f}"]
        if self._last_ap is not None and self._last_ap >= 0:
            parts.append(f"val AP {100 * self._last_ap:.1f}")
        if report is not None:
            losses = {name: getattr(report, field) for field, name in _LOSSES.items()}
            parts += [f"{name} {value:.3f}" for name, value in losses.items() if value]
            parts.append(f"{learner.images_per_second:.1f} images/s")
            waiting = learner.waiting_seconds / max(learner.seconds, 1e-9)
            parts.append(f"{100 * waiting:.0f} % waiting")
        return ", ".join(parts)

    @property
    def is_to_be_measured(self) -> bool:
        """Whether a measurement is due at this step, before the end."""
        every = None if self._validation is None else self._validation.every
        return every is not None and self.learner.step % every == 0 and self.is_active

    def measure(self, reporter: Reporter | None = None) -> "EvaluateSummary | None":
        """Measure and log the current result weights, and save them if they are the best."""
        if self._validation is None:
            return None
        assert self._folder is not None
        assert self._log is not None
        learner, head, weights = self.learner, self.learner.head, self.learner.result_weights()
        current = {k: v.clone() for k, v in head.state_dict().items()}
        head.load_state_dict(weights)
        try:
            found = self._validation.measure(head, reporter or SilentReporter())
        finally:
            head.load_state_dict(current)
            head.train()
        if self._is_best(found.mask.AP, learner.step) and self._validation.keeps_best:
            save_head(self._folder, weights, which="best")
        metrics = {"mask": found.mask.to_dict(), "box": found.box.to_dict()}
        measured_on = self._validation.measured_on
        self._log.add({"step": learner.step, "validation": metrics, "measured_on": measured_on})
        return found

    def end(self, reporter: Reporter, processes: Processes) -> "EvaluateSummary | None":
        """Measure the final weights in the first process only, and close the log."""
        measured = self.measure(reporter) if processes.is_first else None
        if self._log is not None:
            self._log.close()
        processes.wait()
        return measured

    def _is_best(self, ap: float, step: int) -> bool:
        """Record a measurement; returns whether it is the best so far."""
        self._last_ap = ap
        if self.best_ap is not None and ap <= self.best_ap:
            patience = None if self._validation is None else self._validation.patience
            self._since_best += 1
            self.has_settled = patience is not None and self._since_best >= patience
            return False
        self.best_ap, self.best_step, self._since_best = ap, step, 0
        return True

    def _restore(self) -> None:
        """Load the checkpoint, and the best measurement before it from the log."""
        if self._folder is None or not (path := self._folder / CHECKPOINT_FILE).is_file():
            return
        try:
            state = load_checkpoint(self._folder)
            if state.get("run", self._name) != self._name:
                raise HeadError(f"{path} is of another run than its config.json; restore one")
            self.learner.restore(state)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise HeadError(f"{path} does not fit this run ({reason})") from error
        self._saved_step = self.learner.step
        self._lowest_loss = self.learner.recent_loss()
        if (self._folder / BEFORE_FILE).is_file():
            with contextlib.suppress(HeadError, KeyError, TypeError, ArithmeticError):
                losses = load_checkpoint(self._folder, BEFORE_FILE)["losses"]
                self._lowest_loss = min(self._lowest_loss, sum(losses) / len(losses))
        if self._validation is None:
            return
        measured_on = self._validation.measured_on
        # A measurement later than the checkpoint is made again.
        lines = [x for x in read_log(self._folder) if x["step"] <= self.learner.step]
        for line in (x for x in lines if "validation" in x):
            if line.get("measured_on", measured_on) != measured_on:
                warnings.warn(
                    f"{self._folder} was measured on other images or annotations before: its best "
                    "weights are chosen anew",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            with contextlib.suppress(KeyError, TypeError, ValueError):
                self._is_best(float(line["validation"]["mask"]["AP"]), line["step"])


def begin_run(
    learner: Learner,
    folder: Path,
    record: RunRecord,
    processes: Processes,
    *,
    track: Sequence[Tracker],
    validation: Validation | None,
    resume: bool | Literal["longer"],
    same: Sequence[str] = SAME_FIELDS,
) -> Run:
    """Create the folder of a run, or resume the run in it; see :func:`prepare_folder`.

    Only the first process writes. ``track`` names trackers beside ``metrics.jsonl``.
    """
    if processes.is_first:
        prepare_folder(folder, learner.head.config, record, resume=resume, same=same)
    processes.wait()
    log = RunLog(folder, track if processes.is_first else (), record.train)
    # Until the end a detector that is tuned is in the checkpoint alone, and its head fits no other.
    midway = record.joint is None or record.joint["tune"] == "nothing"
    return Run(learner, folder, log, validation, resume=bool(resume), midway=midway)
