"""Progress of a command: a line on a terminal, else a line from time to time."""

import io
import sys
import time
from collections.abc import Callable
from typing import IO, cast

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mfdetr_cli.console import human_bytes, human_time
from mfdetr_cli.text import harmless, put

# Seconds between two lines of progress where there is no terminal.
_PLAIN_EVERY = 10.0
# Seconds after the first units from which on a rate means something.
_SETTLED = 5.0
# A terminal that is narrower has no room for a bar.
_BAR_FROM, _BAR = 80, 20


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

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._console = Console(
            file=cast("IO[str]", _StandardError()), soft_wrap=True, highlight=False
        )
        self._live: Live | None = None
        self._reset("", 0, "", 0)

    def _reset(self, task: str, total: int, unit: str, done: int) -> None:
        self._task, self._total, self._unit = task, total, unit
        self._first, self._done, self._shown, self._bytes = done, done, done, 0
        self._note = ""
        self._started = self._last_line = self._clock()
        # Time and count from which on the rate is taken.
        self._since: tuple[float, int] | None = None

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
        self._live = Live(
            get_renderable=self._shown_line, console=self._console, refresh_per_second=4
        )
        self._live.start()

    def advance(self, count: int = 1, *, num_bytes: int = 0, note: str = "") -> None:
        """Count finished units; ``note`` is shown beside the bar."""
        self._done += count
        self._bytes += num_bytes
        self._note = note or self._note
        now = self._clock()
        # The first units are left out: kernels are compiled and files opened meanwhile.
        self._since = self._since or (now, self._done)
        if self._live is None and now - self._last_line >= _PLAIN_EVERY:
            self._last_line, self._shown = now, self._done
            self.say(self._line())

    def finish(self) -> None:
        """End the task, if it has not ended."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._done > self._shown:
            self.say(self._line())
        self._shown = self._done

    def _shown_line(self) -> Table:
        """The line on a terminal: a note that is too long for it is cut, and no bar comes first."""
        width = self._console.width
        bar = _BAR if width >= _BAR_FROM else 0
        text = Text(harmless(self._line()))
        text.truncate(width - bar - bool(bar), overflow="ellipsis")
        line = Table.grid(padding=(0, 1, 0, 0))
        cells = [ProgressBar(self._total, self._done, width=bar)] if bar else []
        line.add_row(*cells, text)
        return line

    def _line(self) -> str:
        """Step, share, rate and time left first; at the end the rate is that of the whole task."""
        todo = self._total - self._done
        parts = [
            f"{self._task} {100 * self._done // max(self._total, 1)} %",
            f"{self._done}/{self._total} {self._unit}",
        ]
        since, first = self._since if self._since and todo > 0 else (self._started, self._first)
        seconds, done = self._clock() - since, self._done - first
        if done and (todo <= 0 or seconds >= _SETTLED):
            parts.append(f"{done / max(seconds, 1e-9):.1f}/s")
            if todo > 0:
                parts.append(f"{human_time(seconds / done * todo)} left")
        if self._bytes:
            parts.append(human_bytes(self._bytes))
        return ", ".join([*parts, self._note] if self._note else parts)
