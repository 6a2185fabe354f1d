"""Progress of a command: a bar on a terminal, else a line from time to time."""

import io
import sys
import time
from typing import IO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from mfdetr_cli.console import human_bytes, human_time
from mfdetr_cli.text import harmless, put

# Seconds between two lines of progress where there is no terminal.
_PLAIN_EVERY = 10.0


class _StandardError(io.TextIOBase):
    """Standard error, which no closed pipe and no full disk breaks."""

    def __init__(self) -> None:
        # Kept: while a bar is shown, rich puts itself in its place.
        self._stream = sys.stderr

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return (self._stream and self._stream.encoding) or "utf-8"

    def isatty(self) -> bool:
        return bool(self._stream) and self._stream.isatty()

    def write(self, text: str, /) -> int:
        put(self._stream, text)
        return len(text)


class ConsoleReporter:
    """Shows progress on standard error, since standard output is for results."""

    def __init__(self) -> None:
        self._console = Console(
            file=cast("IO[str]", _StandardError()), soft_wrap=True, highlight=False
        )
        self._progress: Progress | None = None
        self._reset("", 0, "", 0)

    def _reset(self, task: str, total: int, unit: str, done: int) -> None:
        self._task, self._total, self._unit = task, total, unit
        self._first, self._done, self._shown, self._bytes = done, done, done, 0
        self._note = ""
        self._started = time.monotonic()
        self._last_line = self._started

    def say(self, message: str) -> None:
        """Print a line."""
        self._console.print(harmless(message), markup=False)

    def warn(self, message: str) -> None:
        """Print a highlighted line."""
        self._console.print(f"warning: {harmless(message)}", style="bold yellow", markup=False)

    def start(self, task: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a task of ``total`` units (a plural noun), ``done`` of them in an earlier run."""
        self._reset(task, total, unit, done)
        if done:
            self.say(f"{task}: {done} of {total} {unit} were done before")
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._progress.start()
        self._progress.add_task(task, total=total, completed=done, rate="", note="")

    def advance(self, count: int = 1, *, num_bytes: int = 0, note: str = "") -> None:
        """Count finished units; ``note`` is shown beside the bar."""
        self._done += count
        self._bytes += num_bytes
        self._note = note or self._note
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0],
                completed=self._done,
                rate=self._rate(),
                note=self._note,
            )
        elif time.monotonic() - self._last_line >= _PLAIN_EVERY:
            self._last_line, self._shown = time.monotonic(), self._done
            self.say(self._line())

    def finish(self) -> None:
        """End the task."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        elif self._done > self._shown:
            self.say(self._line())

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        text = f"{(self._done - self._first) / seconds:.1f} {self._unit}/s"
        if self._bytes:
            text += f", {human_bytes(self._bytes)}"
        return text

    def _line(self) -> str:
        done = max(self._done - self._first, 1)
        left = (time.monotonic() - self._started) / done * (self._total - self._done)
        line = f"{self._task}: {self._done}/{self._total} {self._unit}, {self._rate()}"
        line += f", {human_time(left)} left" if self._done < self._total else ""
        return f"{line}, {self._note}" if self._note else line
