"""The training loop: each step of a source is given to every learner."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from mfdetr_cache.errors import OutputError, StoppedError, TrainingError
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.signals import StoppedBySignal, StopRequest, stop_on_signals
from mfdetr_cache.training.distributed import Processes
from mfdetr_cache.training.input.source import Source, Step
from mfdetr_cache.training.learner import StepReport
from mfdetr_cache.training.regions import RegionSettings
from mfdetr_cache.training.run import Run

# Steps after which something has been learned, if anything can be.
_ENOUGH_TO_LEARN = 100


class TrainingLoop:
    """Trains one head, or several from the same steps.

    Each head ends with the weights that it would have if trained alone. ``split_when_full`` doubles
    the micro-batches of a step when the GPU is out of memory; ``on_step`` is called after each step
    with the number of steps done.
    """

    def __init__(
        self,
        source: Source,
        runs: Sequence[Run],
        reporter: Reporter,
        processes: Processes | None = None,
        *,
        split_when_full: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self._source = source
        self._runs = tuple(runs)
        self._reporter = reporter
        self._processes = processes or Processes()
        self._split_when_full = split_when_full
        self._on_step = on_step
        self._train = runs[0].learner.train
        self._device = runs[0].learner.device
        self._micro_batches = self._train.accumulate

    def run(self, until: int | None = None) -> None:
        """Train until every head is done or has failed, or until step ``until`` (exclusive).

        A signal writes checkpoints and raises StoppedError. So are they written for a step that
        cannot be read (a store that is gone, a reader that was killed) or does not fit into the
        GPU's memory (TrainingError).
        """
        active = [run for run in self._runs if run.is_active]
        if not active:
            return
        first = min(run.learner.step for run in active)
        last = max(run.learner.train.steps for run in active)
        last = last if until is None else min(last, until)
        for run in active:
            run.learner.head.train()
        self._reporter.start("train", last, "steps", done=first)
        stopped = self._run(range(first, last))
        self._reporter.finish()
        self._save(going_on=not stopped)
        # Also after the last step: a command of many steps must not begin with the next one.
        if stopped and (self._processes.world == 1 or any(run.is_active for run in self._runs)):
            step = max(run.learner.step for run in self._runs)
            raise StoppedError(
                f"stopped by a signal at step {step}; go on with the same command and --resume"
            )

    def _run(self, numbers: range) -> bool:
        """Run some steps; returns whether a signal asked to stop."""
        saved = time.monotonic()
        with stop_on_signals() as stop, contextlib.closing(self._source.steps(numbers)) as steps:
            for number in numbers:
                begun = time.perf_counter()
                found = self._next(steps, number, stop)
                if found is None:
                    return True
                step, counts, waited = found
                read = time.perf_counter() - begun
                self._one_step(number, step, self._shares(step, counts), read, waited)
                for run in self._runs:
                    if run.learner.step == number + 1 and run.is_to_be_measured:
                        self._measure(run, stop)
                step.release()
                if number + 1 in (_ENOUGH_TO_LEARN, numbers.stop):
                    self._tell_if_nothing_is_learned(number + 1)
                if self._on_step is not None:
                    self._on_step(number + 1)
                if not any(run.is_active for run in self._runs):
                    break
                if time.monotonic() - saved > 60 * self._train.checkpoint_minutes:
                    self._save(going_on=True)
                    saved = time.monotonic()
            return stop.is_set

    def _next(
        self, steps: Iterator[Step], number: int, stop: StopRequest
    ) -> tuple[Step, list[list[int]], float] | None:
        """The next step, its counts in each process, and seconds waited; None if asked to stop."""
        begun = time.perf_counter()
        try:
            with self._interruptible(stop):
                step = next(steps)
            waited = time.perf_counter() - begun
            self._prepare(step)
            # All processes stop before the same step, whichever of them was asked to.
            counts = self._processes.gather([int(stop.is_set), *step.counts.values()], self._device)
        except StoppedBySignal:
            return None
        except Exception:
            if stop.is_set and self._processes.world == 1:
                return None
            # The weights are those of the last step, whatever is wrong with the next one.
            self._save_what_is_there(number)
            raise
        return None if any(asked for asked, *_ in counts) else (step, counts, waited)

    def _interruptible(self, stop: StopRequest) -> contextlib.AbstractContextManager[None]:
        """Where a signal need not wait for a store; several processes agree on a step instead."""
        return stop.interrupting() if self._processes.world == 1 else contextlib.nullcontext()

    def _save_what_is_there(self, number: int) -> None:
        """Write checkpoints on the way out, without other processes and without other errors."""
        with contextlib.suppress(Exception):
            self._write_checkpoints(going_on=True)
            if self._processes.is_first and any(run.learner.step for run in self._runs):
                self._reporter.say(f"the checkpoint of step {number} is written; --resume goes on")

    def _shares(
        self, step: Step, counts: Sequence[Sequence[int]]
    ) -> Mapping[RegionSettings, tuple[int, int]]:
        """Per kind of regions: the number in processes of lower rank, and in all processes."""
        return {
            regions: (sum(c[i] for c in counts[: self._processes.rank]), sum(c[i] for c in counts))
            for i, regions in enumerate(step.counts, 1)
        }

    def _one_step(
        self,
        number: int,
        step: Step,
        shares: Mapping[RegionSettings, tuple[int, int]],
        read: float,
        waited: float,
    ) -> None:
        """Train every head whose next step is ``number``.

        ``read`` and ``waited`` are seconds: reading and preparing the step, shared by the heads,
        and the part of it in which the loop was idle.
        """
        learning = [run for run in self._runs if run.is_active and run.learner.step == number]
        notes = []
        for run in learning:
            begun = time.perf_counter()
            learner = run.learner
            report = self._learn(run, step, shares[learner.regions])
            learner.images += step.num_images
            learner.seconds += time.perf_counter() - begun + read / len(learning)
            learner.waiting_seconds += waited / len(learning)
            if report is not None and self._processes.is_first:
                run.add_to_log(report)
            notes.append(run.note(report))
        self._reporter.advance(note=notes[0] if notes else "")

    def _tell_if_nothing_is_learned(self, number: int) -> None:
        """Warn of a detector whose boxes are those of no object."""
        if not any(run.learner.has_learned for run in self._runs):
            self._reporter.warn(
                f"none of {number} steps had a detection that is one of an annotated object (IoU "
                f"of {self._train.min_match_iou:g}): nothing is learned. Look at the box AP at the "
                "end of extract; --set match=hungarian --set min_match_iou=0 gives every object one"
            )

    def _measure(self, run: Run, stop: StopRequest) -> None:
        """Measure a head in the first process, unless a signal comes first."""
        if self._processes.is_first:
            with contextlib.suppress(StoppedBySignal), self._interruptible(stop):
                run.measure()
        # The others stop at the same step.
        settled = self._processes.gather([int(run.has_settled)], self._device)
        run.has_settled = any(found for (found,) in settled)

    def _learn(self, run: Run, step: Step, share: tuple[int, int]) -> StepReport | None:
        """One step of one head; out of memory, again in more micro-batches."""
        try:
            while True:
                self._prepare(step)
                with contextlib.suppress(torch.OutOfMemoryError):
                    return run.learner.learn(step.batches(run.learner.regions), *share)
                # Here the exception is gone, and with it what the step had computed so far.
                self._split_further(step)
        except TrainingError as error:
            if self._processes.is_first:
                run.fail(error)
            else:
                run.problem = error
            return None

    def _prepare(self, step: Step) -> None:
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                step.prepare(self._micro_batches)
                return
            self._split_further(step)

    def _split_further(self, step: Step) -> None:
        """Double the micro-batches of this and later steps; TrainingError if that cannot help."""
        step.release()
        torch.cuda.empty_cache()
        if not self._split_when_full or self._micro_batches >= step.num_own_images:
            raise TrainingError(
                f"the GPU's memory does not hold {step.num_own_images} images in "
                f"{self._micro_batches} micro-batch(es); pass --batch-size auto, or --set "
                "accumulate=N, or --amp bf16"
            )
        self._micro_batches *= 2
        self._reporter.say(
            f"the GPU is full: computing each step in {self._micro_batches} micro-batches"
        )

    def _save(self, *, going_on: bool) -> None:
        self._write_checkpoints(going_on=going_on)
        # After a failure the others may be in the middle of a step; torchrun stops them.
        if all(run.problem is None for run in self._runs):
            self._processes.wait()

    def _write_checkpoints(self, *, going_on: bool) -> None:
        """The first process's; with ``going_on``, a full disk is only a warning."""
        if self._processes.is_first:
            for run in self._runs:
                if run.problem is not None:
                    continue
                try:
                    if warning := run.save():
                        self._reporter.warn(warning)
                except OutputError as error:
                    if not going_on:
                        raise
                    self._reporter.warn(f"{error}; training goes on")


def train_alone(
    source: Source,
    run: Run,
    reporter: Reporter,
    processes: Processes,
    *,
    split_when_full: bool,
    on_step: Callable[[int], None] | None,
) -> None:
    """Train one head to its end and write its weights; raises the error that ended it early."""
    TrainingLoop(
        source, [run], reporter, processes, split_when_full=split_when_full, on_step=on_step
    ).run()
    if run.problem is not None:
        raise run.problem
    if run.has_settled:
        reporter.say(f"stopped at step {run.learner.step}: mask AP was best at {run.best_step}")
    if processes.is_first:
        run.save_weights()
