"""The ``mfdetr`` command as a shell runs it, in this process: a new one imports torch first."""

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import typer
from mfdetr_cli.app import app, main
from typer.testing import CliRunner


def _leaves(command: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "list_commands"):
        yield names, command
        return
    for name in command.list_commands(None):
        yield from _leaves(command.get_command(None, name), (*names, name))


# Every command by its names, such as ("cache", "info").
COMMANDS = dict(_leaves(typer.main.get_command(app)))


class Finished(NamedTuple):
    """What a process would have left."""

    returncode: int
    stdout: str
    stderr: str


def mfdetr(*arguments: object, columns: str = "80") -> Finished:
    """Run a command line through its entry point."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["mfdetr", *map(str, arguments)])
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        patch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit) as ended:
            main()
    return Finished(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def run(*arguments: object) -> Any:
    """Run a command through Typer alone, without the entry point and its errors."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
