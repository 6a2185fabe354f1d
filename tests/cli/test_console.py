"""What is printed: numbers are never cut, names are text, and standard output ends no command."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import mfdetr_cli
import pytest
from mfdetr_cli.console import print_evaluation, print_facts, print_table
from mfdetr_cli.progress import ConsoleReporter

METRICS = {"AP": 0.123, "AP50": 0.234, "AP75": 0.345, "APS": 0.456, "APM": 1.0, "APL": -1.0}
NUMBERS = ("12.3", "23.4", "34.5", "45.6", "100.0")


@pytest.mark.parametrize("columns", ["40", "60", "80", None])
def test_numbers_are_whole_at_any_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str | None
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    print_evaluation("all", {"mask": METRICS, "box": METRICS, "ceiling": METRICS})
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


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("[b]title", ["[i]name", "n"], [["bolt [/M6]", "1"], ["wire [red]", "2"]])
    print_facts("[b]facts", {"[red]a": "[/x]"})
    printed = capsys.readouterr().out
    for text in ("[b]title", "[i]name", "bolt [/M6]", "wire [red]", "[b]facts", "[red]a", "[/x]"):
        assert text in printed


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
    return [n.func.id for n in ordered if isinstance(n.func, ast.Name)]


def test_json_is_written_before_anything_is_printed() -> None:
    """What was measured in hours is not lost because a table cannot be shown."""
    commands = 0
    for path in sorted(Path(mfdetr_cli.__file__).parent.rglob("*.py")):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and "json" in [
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
