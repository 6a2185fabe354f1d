"""Signals end every command with a line and exit code 130, and only once they are asked to."""

import errno
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
from mfdetr_cli import __main__ as entry
from mfdetr_cli import app as app_module
from mfdetr_cli.help import HelpfulCommand

from mfdetr_cache.errors import StoppedError
from mfdetr_cache.signals import StoppedBySignal, is_stopping, stop_on_signals

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _a_terminal_that_closes_asks() -> Iterator[None]:
    """Also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def main_with(
    monkeypatch: pytest.MonkeyPatch, command: Any, arguments: tuple[str, ...] = ("detectors",)
) -> int:
    """The exit code of a command line whose command is a function."""
    module = types.ModuleType("mfdetr_cli.detectors")
    module.detectors = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", ["mfdetr", *arguments])
    try:
        app_module.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_ends_any_command(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are registered by the same function."""

    def command(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(30)

    before = [signal.getsignal(s) for s in ASKING]
    assert main_with(monkeypatch, command) == 130
    shown = capsys.readouterr()
    expected = f"error: stopped by {number.name}; what was finished before is kept\n"
    assert (shown.out, shown.err) == ("", expected)
    assert [signal.getsignal(s) for s in ASKING] == before
    assert not is_stopping()


def test_what_a_command_says_of_its_work_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        except KeyboardInterrupt:
            raise StoppedError("stopped: 64 of 149 images are kept") from None

    assert main_with(monkeypatch, command) == 130
    assert capsys.readouterr().err == "error: stopped: 64 of 149 images are kept\n"


def test_a_signal_after_the_end_of_a_command_changes_nothing() -> None:
    script = (
        "import atexit, os, signal, sys; from mfdetr_cli.__main__ import main; "
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM); "
        "sys.argv = ['mfdetr', '--help']; main()"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("moment", ["importing", "parsing"])
def test_a_signal_before_the_command_begins(
    moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of which Python makes a traceback, and Click an empty line."""

    class Importing:
        def __getattr__(self, _name: str) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)

    def parse(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    if moment == "importing":
        monkeypatch.setitem(sys.modules, "mfdetr_cli.app", Importing())  # type: ignore[arg-type]
    monkeypatch.setattr(HelpfulCommand, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", ["mfdetr", "detectors"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    name = "SIGINT" if moment == "importing" else "SIGTERM"
    assert ended.value.code == 130
    expected = f"error: stopped by {name}; what was finished before is kept\n"
    assert capsys.readouterr().err == expected


def test_what_fails_on_the_way_out_does_not_hide_the_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a folder that a thread goes on filling cannot be removed."""

    def command(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    assert main_with(monkeypatch, command) == 130
    assert capsys.readouterr().err.startswith("error: stopped by SIGTERM;")


def test_a_terminal_that_closes_ends_nothing_under_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main_with(monkeypatch, lambda *_: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ASKING)
def test_a_training_is_asked_once_and_told_twice(number: signal.Signals) -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), number)
        assert stop.is_set
        assert is_stopping()
        # While it waits for others it need not come to an end first.
        with pytest.raises(StoppedBySignal), stop.interrupting():
            pass
        with pytest.raises(StoppedBySignal, match=number.name):
            os.kill(os.getpid(), number)
    raised = pytest.raises(StoppedBySignal, match=number.name)
    with stop_on_signals() as stop, raised, stop.interrupting():
        os.kill(os.getpid(), number)
