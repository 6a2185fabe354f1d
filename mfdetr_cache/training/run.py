"""One training and its folder: its learner, checkpoints, log, and measurements on the way."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.choices import Tracker
from mfdetr_cache.errors import HeadError, TrainingError
from mfdetr_cache.head.folder import RunRecord, save_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.reporter import Reporter, SilentReporter
from mfdetr_cache.training.checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from mfdetr_cache.training.distributed import Processes
from mfdetr_cache.training.learner import Learner, StepReport
from mfdetr_cache.training.run_folder import prepare_folder
from mfdetr_cache.training.run_log import RunLog, read_log

if TYPE_CHECKING:
    # A training that measures nothing needs none of what measuring imports.
    from mfdetr_cache.evaluation.measure import EvaluateSummary

_LOG_EVERY = 10


@dataclass(frozen=True, slots=True)
class Validation:
    """How a run is measured.

    Attributes:
        measure: Metrics of a head with the weights to be measured.
        every: Steps between two measurements on the way; None measures at the end alone.
        keeps_best: Whether the best weights that were measured are kept.
    """

    measure: "Callable[[MaskHead, Reporter], EvaluateSummary]"
    every: int | None = None
    keeps_best: bool = True

    @classmethod
    def on_cache(
        cls, cache: FeatureCache, device: torch.device, every: int | None = None
    ) -> "Validation":
        """Measure on a cache of the same detector, every so many steps and at the end."""
        from mfdetr_cache.evaluation.measure import measure

        return cls(lambda head, reporter: measure(cache, head, device, reporter)[0], every)


class Run:
    """One training and its folder.

    Args:
        learner: What is trained.
        folder: The run folder; None keeps nothing.
        log: Its log.
        validation: How it is measured; needs a folder and a log.
        resume: Go back to the folder's checkpoint, where there is one.

    Attributes:
        learner: What is trained.
        problem: Why it ended early, if it did.
        best_ap: Best mask AP measured so far, before a stop too; None without any.
        best_step: The step it was measured at.

    Raises:
        HeadError: If the checkpoint is damaged or of another run.
    """

    def __init__(
        self,
        learner: Learner,
        folder: Path | None = None,
        log: RunLog | None = None,
        validation: Validation | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self.learner = learner
        self.problem: TrainingError | None = None
        self.best_ap: float | None = None
        self.best_step: int | None = None
        self._log = log
        self._last_ap: float | None = None
        self._folder = folder
        self._validation = validation
        if resume:
            self._restore()

    @property
    def is_active(self) -> bool:
        """Whether it has steps left."""
        return self.problem is None and not self.learner.is_done

    def save(self) -> None:
        """Write a checkpoint; where the disk is full, the one before is kept."""
        if self._folder is not None:
            save_checkpoint(self._folder, self.learner.state())

    def add_to_log(self, report: StepReport) -> None:
        """Write down every tenth step, and the last one."""
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
        """What to show beside the progress: speed, losses and AP, or what went wrong."""
        learner = self.learner
        if self.problem is not None:
            return str(self.problem)
        parts = []
        if report is not None:
            seconds = max(learner.seconds, 1e-9)
            boxes = "" if report.box_loss is None else f", boxes {report.box_loss:.3f}"
            parts = [
                f"{learner.images / seconds:.1f} images/s",
                f"{100 * learner.waiting_seconds / seconds:.0f} % waiting",
                f"loss {learner.recent_loss():.3f} (bce {report.bce:.3f}, dice {report.dice:.3f}, "
                f"iou {report.scoring:.3f}){boxes}",
            ]
        if self._last_ap is not None:
            parts.append(f"val AP {100 * self._last_ap:.1f}")
        return ", ".join(parts)

    @property
    def is_to_be_measured(self) -> bool:
        """Whether it is time for a measurement on the way."""
        every = None if self._validation is None else self._validation.every
        return every is not None and self.learner.step % every == 0 and self.is_active

    def measure(self, reporter: Reporter | None = None) -> "EvaluateSummary | None":
        """Measure the result as it is now, log it, and keep its weights if they are the best."""
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
        self._log.add({"step": learner.step, "validation": metrics})
        return found

    def end(self, reporter: Reporter, processes: Processes) -> "EvaluateSummary | None":
        """Measure the final weights, in the first process alone, and close the log."""
        measured = self.measure(reporter) if processes.is_first else None
        if self._log is not None:
            self._log.close()
        processes.wait()
        return measured

    def _is_best(self, ap: float, step: int) -> bool:
        """Remember a measurement; whether it is the best so far."""
        self._last_ap = ap
        if self.best_ap is not None and ap <= self.best_ap:
            return False
        self.best_ap, self.best_step = ap, step
        return True

    def _restore(self) -> None:
        """Go back to the checkpoint, and to the best measurement before it."""
        if self._folder is None or not (path := self._folder / CHECKPOINT_FILE).is_file():
            return
        try:
            self.learner.restore(load_checkpoint(self._folder))
        except (KeyError, RuntimeError, ValueError) as error:
            raise HeadError(f"{path} does not fit this run ({error})") from error
        for line in read_log(self._folder) if self._validation is not None else []:
            # A measurement later than the checkpoint is made again.
            if "validation" in line and line["step"] <= self.learner.step:
                self._is_best(float(line["validation"]["mask"]["AP"]), int(line["step"]))


def begin_run(
    learner: Learner,
    folder: Path,
    record: RunRecord,
    processes: Processes,
    *,
    track: Sequence[Tracker],
    validation: Validation | None,
    resume: bool,
    same: Sequence[str] = ("head", "train", "detector", "annotations"),
) -> Run:
    """Begin the folder of a run, or go on with the run that is in it.

    Args:
        learner: What is trained.
        folder: The run folder.
        record: What its ``config.json`` says beside the architecture.
        processes: Those that train together; the first one writes.
        track: Where numbers go beside ``metrics.jsonl``.
        validation: How it is measured; None if it is not.
        resume: Whether there should be a run to go on with.
        same: What must not have changed then, see :func:`prepare_folder`.

    Returns:
        The run, at its checkpoint where there is one.
    """
    if processes.is_first:
        prepare_folder(folder, learner.head.config, record, resume=resume, same=same)
    processes.wait()
    log = RunLog(folder, track if processes.is_first else (), record.train)
    return Run(learner, folder, log, validation, resume=resume)
