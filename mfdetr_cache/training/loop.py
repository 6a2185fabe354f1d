"""The loop: one stream of batches from a cache, one or several heads that learn from it."""

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import HeadError, OutputError, StoppedError, TrainingError
from mfdetr_cache.head.batch import map_groups
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.signals import stop_on_signals
from mfdetr_cache.training.batch import TrainBatch, collate
from mfdetr_cache.training.checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from mfdetr_cache.training.distributed import Processes, split
from mfdetr_cache.training.input.loader import (
    LoadedImage,
    Loader,
    RegionKey,
    region_key,
    stream_key,
)
from mfdetr_cache.training.input.processes import read_ahead_in_processes
from mfdetr_cache.training.input.staging import overlaps, staged
from mfdetr_cache.training.input.threads import read_ahead
from mfdetr_cache.training.learner import Learner, StepReport
from mfdetr_cache.training.order import rows_of_step, steps_per_epoch
from mfdetr_cache.training.rows import trainable_rows
from mfdetr_cache.training.run_log import RunLog

_LOG_EVERY = 10


@dataclass
class Run:
    """One head on its way through a loop.

    Attributes:
        learner: The head and its optimiser.
        folder: Its run folder; None keeps nothing.
        log: Its log.
        after_step: Called after each of its steps; what it returns is shown beside the progress.
        problem: Why it stopped early, if it did.
    """

    learner: Learner
    folder: Path | None = None
    log: RunLog | None = None
    after_step: Callable[[], str] | None = None
    problem: TrainingError | None = None

    @property
    def is_active(self) -> bool:
        """Whether it has steps left."""
        return self.problem is None and not self.learner.is_done

    def save(self) -> None:
        """Write a checkpoint."""
        if self.folder is not None:
            save_checkpoint(self.folder, self.learner.state())

    def restore(self) -> None:
        """Go back to the checkpoint, where there is one.

        Raises:
            HeadError: If it is damaged or of another run.
        """
        if self.folder is None or not (path := self.folder / CHECKPOINT_FILE).is_file():
            return
        try:
            self.learner.restore(load_checkpoint(self.folder))
        except (KeyError, RuntimeError, ValueError) as error:
            raise HeadError(f"{path} does not fit this run ({error})") from error


@dataclass(frozen=True, slots=True)
class _Built:
    """A step on the device, in so many pieces."""

    pieces: int
    batches: dict[RegionKey, list[TrainBatch]]


class TrainingLoop:
    """Reads every batch once and lets each head learn from it.

    Args:
        cache: Cache of the training split.
        runs: The heads; all of one :func:`stream_key`.
        device: Where they are.
        reporter: Who is told about progress.
        processes: Those that train together.
        split_when_full: Compute a step in more pieces when the GPU's memory does not hold it.

    Attributes:
        rows: Rows with something to learn from.
    """

    def __init__(
        self,
        cache: FeatureCache,
        runs: Sequence[Run],
        device: torch.device,
        reporter: Reporter,
        processes: Processes | None = None,
        *,
        split_when_full: bool = False,
    ) -> None:
        settings = runs[0].learner.train
        self.rows = trainable_rows(cache, settings)
        self._cache = cache
        self._runs = tuple(runs)
        self._device = device
        self._reporter = reporter
        self._processes = processes or Processes()
        self._split_when_full = split_when_full
        self._train = settings
        assert len({stream_key(r.learner.train) for r in runs}) == 1
        layout = cache.layout
        self._views = layout.views if self._train.views == "all" else layout.views[:1]
        self._parts = None
        if self._train.shuffle == "parts":
            self._parts = tuple(row // layout.images_per_part for row in self.rows)
        self._map_names = tuple(dict.fromkeys(n for r in runs for n in r.learner.head.map_names))
        self._pieces = self._train.accumulate
        self._stop = threading.Event()

    def epochs_of(self, steps: int) -> float:
        """How many epochs some steps are.

        Args:
            steps: Number of steps.

        Returns:
            Number of epochs.
        """
        return steps / steps_per_epoch(len(self.rows), self._train.batch_size)

    def run(self, until: int | None = None) -> None:
        """Train until every head is done or has failed, or until a signal asks to stop.

        Args:
            until: Stop before this step; None goes on to the end.

        Raises:
            StoppedError: If a signal ended it; checkpoints are written.
        """
        active = [r for r in self._runs if r.is_active]
        if not active:
            return
        first = min(r.learner.step for r in active)
        last = max(r.learner.train.steps for r in active)
        last = last if until is None else min(last, until)
        for run in active:
            run.learner.head.train()
        self._reporter.start("train", last, "steps", done=first)
        saved = time.monotonic()
        with stop_on_signals(self._stop):
            stream = staged(self._stream(first, last), self._build, self._device)
            for step in range(first, last):
                started = time.perf_counter()
                loaded, batches_of = next(stream)
                waited = time.perf_counter() - started
                going_on = self._one_step(step, loaded, batches_of, started, waited)
                if not going_on or not any(r.is_active for r in self._runs):
                    break
                if time.monotonic() - saved > 60 * self._train.checkpoint_minutes:
                    self._save(going_on=True)
                    saved = time.monotonic()
            stream.close()
        self._reporter.finish()
        self._save(going_on=not self._stop.is_set())
        if self._stop.is_set() and any(r.is_active for r in self._runs):
            step = max(r.learner.step for r in self._runs)
            raise StoppedError(
                f"stopped by a signal at step {step}; go on with the same command and --resume"
            )

    def _stream(self, first: int, last: int) -> Generator[list[LoadedImage], None, None]:
        train, on_gpu = self._train, self._device.type == "cuda"
        learners = [r.learner for r in self._runs]
        load = Loader(
            self._cache,
            self._map_names,
            tuple(self._views),
            len(self.rows),
            {region_key(n): (n.train, n.head.config.roi_size) for n in learners},
            pinned=on_gpu,
        )

        def rows_of(step: int) -> list[int]:
            rows = rows_of_step(self.rows, train.batch_size, train.seed, step, self._parts)
            return self._processes.share_of(rows)

        steps = range(first, last)
        num_threads = train.reader_threads(on_gpu=on_gpu)
        num_processes = train.reader_processes(on_gpu=on_gpu)
        if not num_processes:
            return read_ahead(load, rows_of, steps, num_threads)
        return read_ahead_in_processes(
            load,
            rows_of,
            steps,
            num_processes,
            batch_size=train.batch_size,
            largest_maps=self._cache.largest_maps(self._map_names),
            device=self._device,
            threads_meanwhile=num_threads,
        )

    def _one_step(
        self,
        step: int,
        loaded: list[LoadedImage],
        batches_of: Callable[[], _Built],
        started: float,
        waited: float,
    ) -> bool:
        """Every head that is at this step learns from it; whether to go on afterwards."""
        learning = [r for r in self._runs if r.is_active and r.learner.step == step]
        keys = list(dict.fromkeys(region_key(r.learner) for r in learning))
        counts = [sum(len(item.samples[key].regions) for item in loaded) for key in keys]
        everywhere = self._processes.gather([int(self._stop.is_set()), *counts], self._device)
        before = everywhere[: self._processes.rank]
        places = {
            key: (sum(c[i] for c in before), sum(c[i] for c in everywhere))
            for i, key in enumerate(keys, 1)
        }
        batches = self._built(loaded, batches_of)
        reading = (time.perf_counter() - started) / max(len(learning), 1)
        notes = []
        for run in learning:
            begun = time.perf_counter()
            run.learner.images += self._images_of(step)
            key = region_key(run.learner)
            note = ""
            if places[key][1]:
                note = self._learn(run, loaded, batches, key, places[key])
            else:
                run.learner.pass_over()
            # The head's own time, and its part of what was read for all.
            run.learner.seconds += time.perf_counter() - begun + reading
            run.learner.waiting_seconds += waited / len(learning)
            if note and run.problem is None:
                note = f"{_speed_of(run.learner)}, {note}"
            if run.after_step is not None and run.problem is None:
                note += run.after_step()
            notes.append(note)
        self._reporter.advance(note=notes[0] if notes else "")
        return not any(flags[0] for flags in everywhere)

    def _images_of(self, step: int) -> int:
        train = self._train
        return len(rows_of_step(self.rows, train.batch_size, train.seed, step, self._parts))

    def _built(
        self, loaded: list[LoadedImage], batches_of: Callable[[], _Built]
    ) -> Mapping[RegionKey, list[TrainBatch]]:
        """A step's batches, built again where the one that was prepared cannot be used."""
        try:
            built = batches_of()
            if built.pieces == self._pieces:
                return built.batches
        except torch.OutOfMemoryError:
            # Prepared beside a step that needed the memory.
            torch.cuda.empty_cache()
        return self._build(loaded).batches

    def _build(self, loaded: list[LoadedImage]) -> _Built:
        """Batches for all heads that are not done."""
        keys = dict.fromkeys(region_key(r.learner) for r in self._runs if r.is_active)
        pieces = self._pieces
        return _Built(pieces, self._batches(loaded, list(keys)))

    def _batches(
        self, loaded: list[LoadedImage], keys: Sequence[RegionKey]
    ) -> dict[RegionKey, list[TrainBatch]]:
        """The pieces of this process's share, decoded once for all heads."""
        batches: dict[RegionKey, list[TrainBatch]] = {key: [] for key in keys}
        for piece in split(loaded, self._pieces):
            if not piece:
                continue
            groups = map_groups([p.image for p in piece], self._map_names, self._device)
            for key in keys:
                samples = [p.samples[key] for p in piece]
                batch = collate(samples, self._map_names, self._device, groups)
                if (head := self._cuts_c1(key)) is not None:
                    batch = replace(batch, inputs=head.prepare(batch.inputs))
                batches[key].append(batch)
        return batches

    def _cuts_c1(self, key: RegionKey) -> MaskHead | None:
        """A head that takes work off those of this key, where it can be done beside the others'."""
        if not overlaps(self._device):
            return None
        heads = (r.learner.head for r in self._runs if region_key(r.learner) == key)
        return next((head for head in heads if head.c1 is not None), None)

    def _learn(
        self,
        run: Run,
        loaded: list[LoadedImage],
        batches: Mapping[RegionKey, list[TrainBatch]],
        key: RegionKey,
        place: tuple[int, int],
    ) -> str:
        """One step of one head; what to show beside the progress."""
        pieces = batches[key]
        while True:
            try:
                report = run.learner.learn(pieces, *place)
                break
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                if not self._split_when_full or self._pieces >= len(loaded):
                    run.problem = TrainingError(
                        f"the GPU's memory does not hold {len(loaded)} images in {self._pieces} "
                        "piece(s); pass --batch-size auto, or --set accumulate=N, or --amp bf16"
                    )
            except TrainingError as error:
                run.problem = error
            if run.problem is not None:
                if self._processes.is_first:
                    run.save()
                return str(run.problem)
            self._pieces *= 2
            self._reporter.say(f"the GPU is full: computing each step in {self._pieces} pieces")
            pieces = self._batches(loaded, [key])[key]
        return self._report(run, report)

    def _report(self, run: Run, report: StepReport) -> str:
        learner = run.learner
        logged = run.log is not None and self._processes.is_first
        if logged and (learner.step % _LOG_EVERY == 0 or learner.is_done):
            assert run.log is not None
            run.log.add(
                {
                    "step": learner.step,
                    "lr": report.lr,
                    "loss": report.loss,
                    "bce": report.bce,
                    "dice": report.dice,
                    "scoring": report.scoring,
                    "regions": report.regions,
                    "seconds": round(learner.seconds, 3),
                    "waiting_seconds": round(learner.waiting_seconds, 3),
                }
            )
        return (
            f"loss {learner.recent_loss():.3f} "
            f"(bce {report.bce:.3f}, dice {report.dice:.3f}, iou {report.scoring:.3f})"
        )

    def _save(self, *, going_on: bool) -> None:
        """Checkpoints; where there is something left to do, a full disk ends nothing yet."""
        if self._processes.is_first:
            for run in self._runs:
                if run.problem is not None:
                    continue
                try:
                    run.save()
                except OutputError as error:
                    if not going_on:
                        raise
                    self._reporter.warn(f"{error}; training goes on")
        # After a failure the others may be in the middle of a step; torchrun stops them.
        if all(run.problem is None for run in self._runs):
            self._processes.wait()


def _speed_of(learner: Learner) -> str:
    seconds = max(learner.seconds, 1e-9)
    waiting = 100 * learner.waiting_seconds / seconds
    return f"{learner.images / seconds:.1f} images/s, {waiting:.0f} % waiting"
