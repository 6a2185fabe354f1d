"""The ``mfdetr`` command as a shell runs it, in this process: a new one imports torch first."""

import contextlib
import io
import sys
import warnings
from typing import NamedTuple

import pytest
from mfdetr_cli.app import main


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
