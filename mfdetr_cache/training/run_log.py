"""The log of a run: JSON lines, TensorBoard events and other trackers."""

import contextlib
import importlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from mfdetr_cache.choices import Tracker
from mfdetr_cache.errors import ConfigError, OutputError
from mfdetr_cache.files import opened_regular, unlink_from_others, writing

METRICS_FILE = "metrics.jsonl"


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
        chosen = [_TRACKERS[tracker] for tracker in trackers]
        self._sinks = {name: make(folder, settings) for name, make in chosen}

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
        for name, (log, _) in list(self._sinks.items()):
            try:
                with writing(self._path.parent):
                    log(step, numbers)
            except OutputError as error:
                del self._sinks[name]
                warnings.warn(f"{name} ends here: {error}", stacklevel=2)

    def close(self) -> None:
        """Write pending lines and close the trackers; OutputError if the disk is full."""
        self._write_pending()
        for _, close in self._sinks.values():
            with writing(self._path.parent):
                close()

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


# What records the numbers of a step, and what ends it.
_Sink = tuple[Callable[[int, Mapping[str, float]], None], Callable[[], object]]


def _tensorboard(folder: Path, _settings: Mapping[str, Any]) -> _Sink:
    """Event files in the run folder."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder))

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _wandb(folder: Path, settings: Mapping[str, Any]) -> _Sink:
    """A Weights & Biases run in the run folder; WANDB_MODE=offline is respected."""
    run: Any = importlib.import_module("wandb").init(
        project="mfdetr", name=folder.name, dir=str(folder), config=dict(settings)
    )
    return lambda step, numbers: run.log(dict(numbers), step=step), run.finish


def _mlflow(folder: Path, settings: Mapping[str, Any]) -> _Sink:
    """An MLflow run at MLFLOW_TRACKING_URI."""
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.start_run(run_name=folder.name)
    mlflow.log_params({k: str(v)[:250] for k, v in settings.items()})
    return lambda step, numbers: mlflow.log_metrics(dict(numbers), step=step), mlflow.end_run


_TRACKERS: dict[Tracker, tuple[str, Callable[[Path, Mapping[str, Any]], _Sink]]] = {
    "tensorboard": ("TensorBoard", _tensorboard),
    "wandb": ("WandB", _wandb),
    "mlflow": ("MLflow", _mlflow),
}
