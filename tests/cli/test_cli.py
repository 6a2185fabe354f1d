import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mfdetr_cli import app as app_module
from mfdetr_cli.app import app
from typer.testing import CliRunner

from mfdetr_cache.errors import CheckFailedError, MfdetrError, StoppedError
from tests.pipelines.test_train_head import SMALL
from tests.support import scenes

COMMANDS = [
    ["extract"],
    ["train-head"],
    ["evaluate"],
    ["predict"],
    ["detectors"],
    ["demo"],
    ["cache", "info"],
    ["cache", "verify"],
]


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def mfdetr(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "mfdetr_cli", *(str(a) for a in arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example_and_json(command: list[str]) -> None:
    text = run(*command, "--help").output
    assert "Example:" in text
    assert f"mfdetr {' '.join(command)}" in text
    assert "--json" in text


def test_the_whole_way(tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path) -> None:
    cache, out = tmp_path / "c.zarr", tmp_path / "run"
    run(
        "extract", "--detector", "hf", "--weights", rtdetr_folder, "--images",
        scenes_folder / "images", "--annotations", scenes_folder / "instances.json", "--cache",
        cache, "--json", tmp_path / "extract.json", "--num-queries", 15, "--device", "cpu",
    )  # fmt: skip
    extracted = json.loads((tmp_path / "extract.json").read_text())
    assert extracted["num_images"] == 8
    assert set(extracted["box"]) == {"AP", "AP50", "AP75", "APS", "APM", "APL"}

    assert "complete" in run("cache", "info", cache, "--json", tmp_path / "info.json").output
    info = json.loads((tmp_path / "info.json").read_text())
    assert info["complete"] is True
    assert info["cache_id"] == extracted["cache_id"]
    assert sum(a["share"] for a in info["arrays"]) < 1

    small = [x for k, v in SMALL.items() for x in ("--set", f"{k}={v}")]
    run(
        "train-head", "--cache", cache, "--val-cache", cache, "--out", out, "--recipe", "paper",
        *small, "--max-steps", 3, "--device", "cpu", "--json", tmp_path / "train.json",
    )  # fmt: skip
    trained = json.loads((tmp_path / "train.json").read_text())
    assert trained["steps"] == 3

    run("evaluate", "--cache", cache, "--head", out, "--json", tmp_path / "eval.json")
    measured = json.loads((tmp_path / "eval.json").read_text())
    for kind in ("mask", "box", "floor", "ceiling"):
        assert set(measured[kind]) == {"AP", "AP50", "AP75", "APS", "APM", "APL"}
    assert measured["mask"] == trained["validation"]["mask"]
    assert measured["box"] == extracted["box"]


def test_verify_has_exit_code_1_for_a_fault(tmp_path: Path, drawn_cache: Path) -> None:
    copy = tmp_path / "copy.zarr"
    shutil.copytree(drawn_cache, copy)
    assert mfdetr("cache", "verify", copy, "--full").returncode == 0
    next(copy.glob("views/base/queries/c/0/0/0")).write_bytes(b"torn")
    finished = mfdetr("cache", "verify", copy, "--json", tmp_path / "v.json")
    assert finished.returncode == 1
    assert "1 of 1 parts are broken" in finished.stderr
    assert json.loads((tmp_path / "v.json").read_text())["broken_parts"] == [["base", 0]]
    assert mfdetr("cache", "verify", tmp_path / "absent").returncode == 2


def test_detectors_lists_and_writes(tmp_path: Path) -> None:
    assert "DEIMv2" in run("detectors", "--json", tmp_path / "d.json").output
    assert len(json.loads((tmp_path / "d.json").read_text())["detectors"]) == 12


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path, scenes_folder: Path) -> None:
    for arguments, message in (
        (["cache", "info", tmp_path / "absent"], "does not exist; make it with: mfdetr extract"),
        (
            ["extract", "--weights", tmp_path, "--images", scenes_folder / "images",
             "--annotations", scenes_folder / "instances.json", "--cache", tmp_path / "c"],
            "is no detector: it has no config.json",
        ),
        (
            ["train-head", "--cache", "c", "--out", "o", "--set", "hiden_dim=1"],
            "unknown setting 'hiden_dim'; did you mean 'hidden_dim'?",
        ),
    ):  # fmt: skip
        finished = mfdetr(*arguments)
        assert finished.returncode == 2
        lines = finished.stderr.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert message in lines[0]
        assert "Traceback" not in finished.stderr


def test_unknown_options_are_exit_code_2() -> None:
    assert mfdetr("extract", "--weight", "x").returncode == 2


@pytest.mark.parametrize(
    ("error", "code"), [(MfdetrError, 2), (CheckFailedError, 1), (StoppedError, 130)]
)
def test_errors_have_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[Exception],
    code: int,
) -> None:
    def fail() -> None:
        raise error("something\nwrong")

    monkeypatch.setattr(app_module, "app", fail)
    with pytest.raises(SystemExit) as caught:
        app_module.main()
    assert caught.value.code == code
    assert capsys.readouterr().err == "error: something wrong\n"


def test_a_bug_gets_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app_module, "app", fail)
    with pytest.raises(ZeroDivisionError):
        app_module.main()


def test_a_json_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MfdetrError, match=r"--json .* cannot be written"):
        run("detectors", "--json", tmp_path / "file" / "x.json")


def test_existing_files_of_the_user_stay(tmp_path: Path, scenes_folder: Path) -> None:
    before = scenes.load_annotations(scenes_folder)
    (tmp_path / "o").mkdir()
    (tmp_path / "o/notes.txt").write_text("mine")
    mfdetr("train-head", "--cache", tmp_path / "absent", "--out", tmp_path / "o")
    assert (tmp_path / "o/notes.txt").read_text() == "mine"
    assert scenes.load_annotations(scenes_folder) == before
