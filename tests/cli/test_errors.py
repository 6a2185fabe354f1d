"""What a command says of wrong input, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mfdetr_cli import app as app_module
from mfdetr_cli.app import app
from typer.testing import CliRunner

from mfdetr_cache.errors import (
    CheckFailedError,
    MfdetrError,
    OutputError,
    StoppedError,
)
from tests.support.command import mfdetr, run


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path, scenes_folder: Path) -> None:
    for arguments, message in (
        (["cache", "info", tmp_path / "absent"], "does not exist; make it with: mfdetr extract"),
        (
            ["extract", "--weights", tmp_path, "--images", scenes_folder / "images",
             "--annotations", scenes_folder / "instances.json", "--cache", tmp_path / "c"],
            "is no detector: it has no config.json",
        ),
        (
            ["train-head", "--cache", tmp_path, "--out", "o", "--set", "hiden_dim=1"],
            "unknown setting 'hiden_dim'; did you mean 'hidden_dim'?",
        ),
    ):  # fmt: skip
        finished = mfdetr(*arguments)
        assert finished.returncode == 2
        lines = finished.stderr.strip().splitlines()
        # extract says what it reads before it reads it.
        assert [line.partition(" ")[0] for line in lines[:-1]] in ([], ["reading"])
        assert lines[-1].startswith("error: ")
        assert message in lines[-1]
        assert "Traceback" not in finished.stderr


def test_an_option_is_not_taken_for_the_value_of_another(tmp_path: Path) -> None:
    for words, said in (
        (["extract", "--json", "--dataset", tmp_path], "--json needs a value, and --dataset is"),
        (["predict", "a.png", "--out", "--device=cpu"], "--out needs a value, and --device=cpu"),
        (["cache", "info", "--json", "-h"], "--json needs a value, and -h is another option"),
    ):
        done = mfdetr(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"error: {said}" in done.stderr


def test_unknown_options_are_exit_code_2_of_the_process() -> None:
    command = [sys.executable, "-m", "mfdetr_cli", "extract", "--weight", "x"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "No such option: --weight" in finished.stderr


def ended_by(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code where a command raises an error."""

    def fail(prog_name: str) -> None:
        raise error

    monkeypatch.setattr(app_module, "app", fail)
    with pytest.raises(SystemExit) as ended:
        app_module.main()
    return int(str(ended.value.code))


@pytest.mark.parametrize(
    ("error", "code"), [(MfdetrError, 2), (CheckFailedError, 1), (StoppedError, 130)]
)
def test_errors_have_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[Exception],
    code: int,
) -> None:
    assert ended_by(error("something\nwrong"), monkeypatch) == code
    assert capsys.readouterr().err == "error: something wrong\n"


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libtorch.so: failed to map segment"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nframe 0"),
        RuntimeError("can't start new thread"),
    ],
)
def test_too_little_memory_and_too_few_threads_are_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_by(error, monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is not enough memory, or too few threads")
    assert str(error).partition("\n")[0] in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "bug", [ImportError("no x"), RuntimeError("shapes differ"), ZeroDivisionError("by zero")]
)
def test_a_bug_gets_a_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(bug), match=str(bug)):
        ended_by(bug, monkeypatch)


def test_no_result_is_written_over_what_is_not_ours(tmp_path: Path, drawn_cache: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"images": []}')
    (tmp_path / "link.json").symlink_to(mine)
    for command, option in (
        (("detectors",), "--json"),
        (("cache", "view", drawn_cache), "--out"),
        (("export", "--head", tmp_path), "--out"),
        (("evaluate", "--cache", drawn_cache, "--head", tmp_path), "--save-results"),
    ):
        for path in (mine, tmp_path / "link.json"):
            with pytest.raises(OutputError, match=f"{option} .* is there and was not written by"):
                run(*command, option, path)
    assert mine.read_text() == '{"images": []}'
    (tmp_path / "ablation.csv").write_text("mine, of mfdetr-cache")
    ablate = ("ablate", "--cache", drawn_cache, "--val-split", 4, "--recipe", "demo")
    with pytest.raises(OutputError, match=r"ablation\.csv is there and was not written"):
        run(*ablate, "--out", tmp_path)
    with pytest.raises(OutputError, match=r"ablation\.csv is there and was not written"):
        run("export", "--head", tmp_path, "--out", tmp_path / "ablation.csv")
    # One's own is replaced, and what is no file gets the document and stays what it is.
    for _ in range(2):
        run("detectors", "--json", tmp_path / "own.json")
    run("cache", "view", drawn_cache, "--out", tmp_path / "own.html", "--count", 1)
    run("cache", "view", drawn_cache, "--out", tmp_path / "own.html", "--count", 1)
    command = [sys.executable, "-m", "mfdetr_cli", "detectors", "--json", "/dev/stdout"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(said[: said.rindex("}") + 1])["written_by"] == "mfdetr-cache"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_result_that_cannot_be_written_is_shown_all_the_same() -> None:
    done = CliRunner().invoke(app, ["detectors", "--json", "/dev/full"])
    assert isinstance(done.exception, OutputError)
    assert "h-detr-r50" in done.output
