"""Processes that work for this one."""

from pathlib import Path

import pytest

from mfdetr_cache.child_process import start_child


def test_a_terminal_stops_no_child_even_while_it_starts() -> None:
    code = "import os, signal; [os.kill(os.getpid(), s) for s in (signal.SIGINT, signal.SIGHUP)]"
    assert start_child(code, []).wait() == 0


def test_a_child_imports_what_this_process_can_and_no_file_of_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise ValueError")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/of_a_user.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "code")
    assert start_child("import json, of_a_user", []).wait() == 0
