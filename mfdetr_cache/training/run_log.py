"""The log of a run: JSON lines, TensorBoard events and other trackers."""

import contextlib
import importlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

from mfdetr_cache.choices import Tracker
from mfdetr_cache.errors import ConfigError, OutputError
from mfdetr_cache.files import opened_regular, unlink_from_others, writing

METRICS_FILE = "metrics.jsonl"


class _Sink(Protocol):
    """A tracker."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record scalars of a step."""

    def close(self) -> None:
        """Flush and close."""


class RunLog:
    """The log of one run: lines in ``metrics.jsonl``, their numbers in the trackers too.

    ``settings`` are shown by the trackers as the run's configuration. ConfigError if a tracker's
    package is not installed, OutputError if ``metrics.jsonl`` cannot be written.
    """

    def __init__(
        self, folder: Path, trackers: Sequence[Tracker] = (), settings: Mapping[str, Any] = {}
    ) -> None:
        self._path = folder / METRICS_FILE
        unlink_from_others(self._path)
        self._pending: list[str] = []
        made: dict[Tracker, Callable[[Path, Mapping[str, Any]], _Sink]]
        made = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow}
        self._sinks: list[_Sink] = [made[t](folder, settings) for t in trackers]

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line with ``step``; trackers get nested numbers as ``outer/inner``.

        A full disk does not end the training: lines that could not be written are kept for the next
        call, and a tracker that cannot write is dropped with a warning.
        """
        self._pending.append(json.dumps(line) + "\n")
        try:
            self._write_pending()
        except OutputError as error:
            if len(self._pending) == 1:
                warnings.warn(f"{error}; training goes on", stacklevel=2)
        numbers = dict(_numbers(line))
        step = int(numbers.pop("step"))
        for sink in list(self._sinks):
            try:
                with writing(self._path.parent):
                    sink.log(step, numbers)
            except OutputError as error:
                self._sinks.remove(sink)
                warnings.warn(f"{type(sink).__name__.strip('_')} ends here: {error}", stacklevel=2)

    def close(self) -> None:
        """Write pending lines and close the trackers; OutputError if the disk is full."""
        self._write_pending()
        for sink in self._sinks:
            with writing(self._path.parent):
                sink.close()

    def _write_pending(self) -> None:
        with writing(self._path), open(self._path, "a", opener=opened_regular) as file:
            before = file.tell()
            try:
                file.write("".join(self._pending))
                file.flush()
            except OSError:
                # Half a line would spoil the next one.
                os.ftruncate(file.fileno(), before)
                raise
        self._pending.clear()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log in order, without one that is cut off because of a kill."""
    path = folder / METRICS_FILE
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def require_trackers(trackers: Sequence[Tracker]) -> None:
    """Refuse trackers that are unknown or not installed; the ConfigError says what to install."""
    for tracker in trackers:
        if tracker not in get_args(Tracker):
            known = ", ".join(get_args(Tracker))
            raise ConfigError(f"--track {tracker}: unknown; use {known} or none")
        try:
            importlib.import_module(tracker)
        except ImportError:
            raise ConfigError(
                f"--track {tracker}: the package is not installed; pip install {tracker}"
            ) from None


def _numbers(line: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in line.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found.append((prefix + key, float(value)))
    return found


class _TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, _settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A Weights & Biases run in the run folder; WANDB_MODE=offline is respected."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self._run: Any = wandb.init(
            project="mfdetr", name=folder.name, dir=str(folder), config=dict(settings)
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """An MLflow run at MLFLOW_TRACKING_URI."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.start_run(run_name=folder.name)
        self._mlflow.log_params({k: str(v)[:250] for k, v in settings.items()})

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        self._mlflow.end_run()
