"""Output on standard output: tables, names with values, lines."""

import io
import os
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Literal

from mfdetr_pipelines.numbers import metric_table
from rich.box import ASCII, SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mfdetr_cli.text import harmless, put

# Cells up to so many letters are numbers or as good as numbers, and stay on one line.
_LONGEST_WHOLE = 14
# Below this, wrapped names cannot be read, and a table is spelled out row by row.
_NARROWEST = 12
_GAP = 3
_WIDTH_OF_A_FILE = 500


def is_first_process() -> bool:
    """Whether this process prints results; under ``torchrun`` only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


def human_bytes(count: float) -> str:
    """Bytes in powers of 1000, to about three digits.

    >>> human_bytes(245_911_668)
    '246 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def counted(count: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1.

    >>> counted(1, "part"), counted(0, "part")
    ('1 part', '0 parts')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def human_time(seconds: float) -> str:
    """Such as ``12 s``, ``3 min 20 s`` or ``2 h 5 min``.

    >>> human_time(200)
    '3 min 20 s'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    justify: Literal["left", "right"] = "right",
) -> None:
    """Print a table; text wraps in a narrow terminal, numbers are never cut.

    The first column is left-aligned, ``justify`` is for the others.
    """
    title, rows = harmless(title), [[harmless(cell) for cell in row] for row in rows]
    widest = [max(cell_len(c) for c in cells) for cells in zip(columns, *rows, strict=True)]
    wraps = [i == 0 or width > _LONGEST_WHOLE for i, width in enumerate(widest)]
    least = [min(width, _NARROWEST) if w else width for w, width in zip(wraps, widest, strict=True)]
    console = _console()
    if sum(least) + _GAP * (len(columns) - 1) > console.width:
        lines = [_spelled_out(columns, row, console.width) for row in rows]
        print_lines(title, *(line for found in lines for line in found), "")
        return
    encoding = sys.stdout.encoding if sys.stdout else ""
    lines_of = SIMPLE_HEAD if (encoding or "utf-8").lower().startswith("utf") else ASCII
    table = Table(
        title=Text(title), title_justify="left", box=lines_of, show_edge=False, pad_edge=False
    )
    for index, column in enumerate(columns):
        how: Literal["left", "right"] = justify if index else "left"
        table.add_column(Text(column), justify=how, no_wrap=not wraps[index], overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _print(console, table)


def _spelled_out(columns: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    """A row that is wider than the terminal: its name, and the other cells below."""
    pairs = (
        f"{c} {cell}".replace(" ", "\0")
        for c, cell in zip(columns[1:], row[1:], strict=True)
        if cell
    )
    below = textwrap.wrap("  ".join(pairs), width - 2, break_on_hyphens=False)
    return [row[0], *("  " + line.replace("\0", " ") for line in below)]


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print names and values."""
    table = Table(title=Text(harmless(title)), title_justify="left", show_header=False, box=None)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(harmless(name)), Text(harmless(value)))
    _print(_console(), table)


def print_next(*commands: Sequence[object]) -> None:
    """Print what people do next, as commands to type."""
    print_lines("next:", *("  mfdetr " + shlex.join(map(str, words)) for words in commands))


def print_lines(*lines: str) -> None:
    """Print lines."""
    put(sys.stdout, "".join(f"{harmless(line)}\n" for line in lines))


def _console() -> Console:
    """A console that renders into memory."""
    terminal = bool(sys.stdout) and sys.stdout.isatty()
    # What goes into a pipe or a file has no width, unless somebody says so.
    width = None if terminal or "COLUMNS" in os.environ else _WIDTH_OF_A_FILE
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
    console.width = max(console.width, _NARROWEST)
    return console


def _print(console: Console, table: Table) -> None:
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    # Not harmless: what is printed here has colours of our own.
    lines = [*(line.rstrip() for line in console.file.getvalue().splitlines()), ""]
    put(sys.stdout, "".join(f"{line}\n" for line in lines))


_METRIC_NAMES = {
    "floor": "floor: box as mask",
    "ceiling": "ceiling: annotated mask in box",
    "boundary": "mask, boundary AP",
    "own": "masks of the detector itself",
}


def print_metrics(title: str, metrics: Mapping[str, Mapping[str, float] | None]) -> None:
    """Print sets of metrics in [0, 1], in percent, each in a row behind its name."""
    named = {_METRIC_NAMES.get(name, name): found for name, found in metrics.items()}
    print_table(title, *metric_table(named))
