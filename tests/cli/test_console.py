"""What is printed: numbers are never cut, names are text, and standard output ends no command."""

import ast
import contextlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import mfdetr_cli
import pytest
from mfdetr_cli.console import print_facts, print_metrics, print_table
from mfdetr_cli.output import CommandOutput
from mfdetr_cli.progress import ConsoleReporter
from mfdetr_cli.recipes import recipes
from mfdetr_pipelines.config.training import RecipesConfig

from mfdetr_cache.config import to_dict
from mfdetr_cache.training.recipes import RECIPES, build_recipe
from tests.support.command import Finished, mfdetr

METRICS = {"AP": 0.123, "AP50": 0.234, "AP75": 0.345, "APS": 0.456, "APM": 1.0, "APL": -1.0}
NUMBERS = ("12.3", "23.4", "34.5", "45.6", "100.0")


@pytest.mark.parametrize("columns", ["40", "60", "80", None])
def test_numbers_are_whole_at_any_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str | None
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    print_metrics("all", {"mask": METRICS, "box": METRICS, "ceiling": METRICS})
    names = ["fire extinguisher cabinet, wall mounted, lower storey", "disc"]
    print_table("names", ["", *METRICS], [[name, *NUMBERS, "-"] for name in names])
    printed = capsys.readouterr().out
    assert "…" not in printed
    for number in NUMBERS:
        assert printed.count(number) == 5
    if columns is not None:
        assert max(map(len, printed.splitlines())) <= int(columns) or columns == "40"
    else:
        # A line of a pipe is a row of the table.
        (line,) = [row for row in printed.splitlines() if "storey" in row]
        assert all(number in line for number in NUMBERS)


@pytest.mark.parametrize("columns", ["0", "1", "", "-3", "x"])
def test_a_width_that_is_none_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, columns: str, drawn_cache: Path
) -> None:
    def typed() -> Finished:
        return mfdetr("cache", "info", drawn_cache, columns=columns)

    done = typed()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Cache")
    monkeypatch.setattr(sys, "flags", types.SimpleNamespace(optimize=2))
    assert "drops the texts" in typed().stderr


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_a_recipe_is_listed_with_its_meaning(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipes(RecipesConfig(name), CommandOutput(tmp_path / "recipe.json"))
    assert build_recipe("fast", {}, tmp_path / "recipe.json") == RECIPES[name]()
    printed = capsys.readouterr().out.splitlines()
    recipe = RECIPES[name]()
    for field, value in (to_dict(recipe.head) | to_dict(recipe.train)).items():
        words = next(line.split() for line in printed if line.startswith(f"{field} "))
        assert len(words) >= (4 if value != [] else 3)


def test_auto_is_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    recipes(RecipesConfig(), CommandOutput(None))
    recipes(RecipesConfig("auto"), CommandOutput(None))
    printed = capsys.readouterr().out
    assert "\nauto " in printed
    assert printed.splitlines()[-1].startswith("fast or paper")


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("[b]title", ["[i]name", "n"], [["bolt [/M6]", "1"], ["wire [red]", "2"]])
    print_facts("[b]facts", {"[red]a": "[/x]"})
    printed = capsys.readouterr().out
    for text in ("[b]title", "[i]name", "bolt [/M6]", "wire [red]", "[b]facts", "[red]a", "[/x]"):
        assert text in printed


@pytest.mark.parametrize("columns", [60, 80, 110, 140])
def test_step_share_rate_and_time_left_are_whole_at_any_width(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """On a terminal, in the longest training there is, with its losses and AP beside."""
    master, slave = os.openpty()
    monkeypatch.setenv("COLUMNS", str(columns))
    note = "loss 1.234, val AP 25.7, bce 0.123, dice 0.456, iou 0.789, 155.3 images/s, 12 % waiting"
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        seconds = 0.0
        reporter = ConsoleReporter(clock=lambda: seconds)
        reporter.start("train", 88500, "steps", done=8400)
        reporter.advance(100)
        seconds = 36000
        reporter.advance(40000, num_bytes=103_000_000, note=note)
        reporter.finish()
    written = b""
    with contextlib.suppress(OSError):  # the end of a terminal that nobody writes to
        while piece := os.read(master, 1 << 16):
            written += piece
    os.close(master)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode()).replace("\r", "\n").splitlines()
    last = [line.rstrip() for line in lines if line.strip()][-1]
    assert "train 54 %, 48500/88500 steps, 1.1/s, 10 h 0 min left" in last
    assert max(map(len, lines)) <= columns
    assert ("103 MB" in last, "val AP 25.7" in last) == (columns > 80, columns > 100)
    assert ("━" in last) == (columns >= 80)


def test_no_time_is_left_before_it_means_something(capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed training whose first step compiles for five minutes; then two steps a second."""
    seconds = 0.0
    reporter = ConsoleReporter(clock=lambda: seconds)
    reporter.start("train", 2000, "steps", done=1000)
    for step in range(1000):
        seconds += 0.5 if step else 300
        reporter.advance()
    reporter.finish()
    first, *others, last = capsys.readouterr().err.splitlines()[1:]
    assert first == "train 50 %, 1001/2000 steps"
    assert others[0] == "train 51 %, 1021/2000 steps, 2.0/s, 8 min 10 s left"
    assert others[-1] == "train 99 %, 1981/2000 steps, 2.0/s, 9.5 s left"
    assert last == "train 100 %, 2000/2000 steps, 1.3/s"


PRINTS = (
    "import sys\nfrom mfdetr_cli.console import print_lines, print_table\n"
    "print_table('t', ['', 'n'], [['\u87ba\u4e1d', '12.5']])\n"
    "print_lines(*['a line'] * 20_000)\nprint_lines('the last one')\nsys.exit(7)"
)
WARNS = (
    "import sys\nfrom mfdetr_cli.progress import ConsoleReporter\n"
    "reporter = ConsoleReporter()\nfor _ in range(20):\n    reporter.warn('a' * 9999)\n"
    "print('12.5')\nsys.exit(7)"
)


@pytest.mark.parametrize(
    ("shell", "output"),
    [
        ("PYTHONIOENCODING=cp1252 {}", "12.5"),
        ("{} | head -n 1", "t"),
        ("{} > /dev/full", ""),
        ("{} >&-", ""),
    ],
)
def test_standard_output_ends_no_command(shell: str, output: str) -> None:
    command = shell.format(f'"{sys.executable}" -c "$PRINTS"')
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PRINTS": PRINTS},
        check=False,
    )
    # The exit code is the command's own, whatever became of its text.
    assert done.returncode == 7
    assert done.stderr == ""
    assert output in done.stdout


@pytest.mark.parametrize("shell", ["{} 2> >(head -n 1)", "{} 2> /dev/full", "{} 2>&-"])
def test_standard_error_ends_no_command(shell: str) -> None:
    done = subprocess.run(
        ["bash", "-c", shell.format(f'"{sys.executable}" -c "$WARNS"')],
        capture_output=True,
        text=True,
        env={**os.environ, "WARNS": WARNS},
        check=False,
    )
    assert done.returncode == 7
    assert "12.5" in done.stdout


def calls(function: ast.FunctionDef) -> list[str]:
    found = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
    ordered = sorted(found, key=lambda n: (n.lineno, n.col_offset))
    return [getattr(n.func, "attr", getattr(n.func, "id", "")) for n in ordered]


def test_json_is_written_before_anything_is_printed() -> None:
    """What was measured in hours is not lost because a table cannot be shown."""
    commands = 0
    for path in sorted(Path(mfdetr_cli.__file__).parent.rglob("*.py")):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and "out" in [
                a.arg for a in function.args.args
            ]:
                names = calls(function)
                if "write_json" not in names:
                    continue
                commands += 1
                first = next(
                    (i for i, n in enumerate(names) if n.startswith(("print", "_show"))), 99
                )
                assert names.index("write_json") < first, f"{path.stem}: {function.name}"
    assert commands >= 18


def test_names_are_shown_and_never_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    """Escape codes, a terminal's title, a NUL, a reversed ending, half a character."""
    name = "x\x1b]0;mine\x07\x1b[31mred\0\u202egpj.exe\ud800\x9b2J"
    ConsoleReporter().warn(f"skipped: {name}")
    print_table(name, ["", "objects"], [[name, "3"]])
    print_facts(name, {name: name})
    said = "".join(capsys.readouterr())
    assert not any(c in said for c in "\x1b\x07\0\u202e\ud800\x9b")
    assert said.count("\\x1b[31mred\\x00\\u202egpj.exe\\ud800\\x9b2J") >= 3
