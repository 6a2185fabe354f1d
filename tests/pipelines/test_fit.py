import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from mfdetr_cli.app import app
from mfdetr_cli.signature import built
from mfdetr_pipelines.config.copy_paste import CopyPasteConfig
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.config.fit import FitConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.fit import FitSummary, run_fit

from mfdetr_cache.coco.options import LabelOptions
from mfdetr_cache.coco.synthetic import write_synthetic_split
from mfdetr_cache.demo import demo_detector
from mfdetr_cache.errors import DatasetError, MfdetrError, StoppedError
from mfdetr_cache.files import PARTIAL
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.config import Length
from tests.support.browser import require_readable

KINDS: dict[str, Any] = {
    "copy-paste": CopyPasteConfig,
    "extract": ExtractConfig,
    "fit": FitConfig,
    "train-head": TrainHeadConfig,
    "evaluate": EvaluateConfig,
}


def fit(
    data: Path, out: Path, reporter: SilentReporter | None = None, **changes: Any
) -> FitSummary:
    config = FitConfig(
        data,
        str(demo_detector()),
        out,
        **{"recipe": "demo", "length": Length(4), "views": 1, "device": "cpu", **changes},
    )
    return run_fit(config, reporter or SilentReporter())


def parsed(line: str) -> Any:
    """The settings that a command line gives."""
    _, name, *words = shlex.split(line)
    command = typer.main.get_command(app).get_command(None, name)  # type: ignore[attr-defined]
    return built(KINDS[name], command.make_context(name, words).params)


class Stopping(SilentReporter):
    """Stops before a command, as a signal would."""

    def __init__(self, stop_before: str) -> None:
        self.stop_before = stop_before

    def say(self, message: str) -> None:
        if message.startswith(f"\n$ mfdetr {self.stop_before}"):
            raise StoppedError("stopped")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic_split(folder, "train", 0, 6)
    write_synthetic_split(folder, "valid", 10_000, 3)
    return folder


@pytest.fixture(scope="module")
def fresh(data: Path, tmp_path_factory: pytest.TempPathFactory) -> FitSummary:
    return fit(data, tmp_path_factory.mktemp("fresh"))


def test_the_printed_commands_are_what_was_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mfdetr_pipelines.fit as module

    run: list[Any] = []
    for name in ("run_extract", "run_train_head", "run_evaluate"):
        action = getattr(module, name)
        monkeypatch.setattr(module, name, lambda c, r, action=action: run.append(c) or action(c, r))
    names = tmp_path / "a b.txt"
    names.write_text("circle\nsquare\ntriangle\nstar\n")
    labels = LabelOptions({"disc": "circle"}, ("disc",))
    found = fit(data, tmp_path / "out", said := Lines(), views=2)
    assert [parsed(line) for line in found.commands] == run
    box = found.evaluation.box
    told = f"box AP {100 * box.AP:.1f}, AP50 {100 * box.AP50:.1f}, "
    before_training = said.lines[: said.lines.index(f"\n$ {found.commands[2]}")]
    assert any(line.startswith(told) for line in before_training)
    assert found.evaluation.num_images == 3
    assert found.evaluation.box.AP > 0.3
    assert parsed(found.next_commands[1]).copies == 6
    assert found.page.read_text().count("<img ") == 5 * len(found.pictures) == 15
    run.clear()
    config = FitConfig(
        data,
        "w",
        tmp_path / "o",
        input_size=(96, 128),
        num_queries=20,
        labels=names,
        categories=labels,
        on_bad_annotation="skip",
    )
    monkeypatch.setattr(module, "run_extract", lambda c, _: run.append(c) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_fit(config, line := Lines())
    assert parsed(next(text for text in line.lines if text.startswith("\n$ "))[3:]) == run[0]


class Lines(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_its_page_is_readable_in_a_browser(fresh: FitSummary, tmp_path: Path) -> None:
    require_readable(fresh.page.read_text(), tmp_path)


def test_the_same_command_goes_on(data: Path, tmp_path: Path, fresh: FitSummary) -> None:
    out = tmp_path / "out"
    # As a kill leaves it that comes while the first cache is created.
    half_written = out / f"val.zarr{PARTIAL}" / f"zarr.0{PARTIAL}"
    half_written.parent.mkdir(parents=True)
    half_written.write_bytes(b"{")
    for before, said in (("train-head", "the same command goes on"), ("evaluate", "stopped")):
        with pytest.raises(StoppedError, match=said):
            fit(data, out, Stopping(before))
    again = fit(data, out)
    assert again.evaluation.mask == fresh.evaluation.mask
    assert again.cache_bytes == fresh.cache_bytes
    assert not list(out.rglob(f"*{PARTIAL}"))


def test_without_another_split_training_images_are_left_out(data: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copytree(data / "train", alone / "train")
    shutil.copy(data / "instances_train.json", alone)
    found = fit(alone, tmp_path / "out")
    assert found.evaluation.num_images == 1
    assert "--set val_split=5" in found.commands[1]


def test_what_cannot_be_learned_from_is_said_first(data: Path, tmp_path: Path) -> None:
    """Not after the split to measure on was extracted."""
    boxes = tmp_path / "boxes"
    shutil.copytree(data, boxes)
    document = json.loads((boxes / "instances_train.json").read_text())
    for annotation in document["annotations"]:
        annotation["segmentation"] = []
    (boxes / "instances_train.json").write_text(json.dumps(document))
    with pytest.raises(DatasetError, match=r"instances_train\.json has no object with a mask"):
        fit(boxes, tmp_path / "out")
    (boxes / "instances_train.json").unlink()
    with pytest.raises(DatasetError, match="has no split 'train'; it has valid"):
        fit(boxes, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_objects_are_pasted_where_there_is_another_split(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        fit(data, out, Stopping("copy-paste"), copies=1)
    (out / f"pasted-1/images{PARTIAL}").mkdir(parents=True)  # as one that was killed while pasting
    found = fit(data, out, copies=1, views=None)
    assert [shlex.split(line)[1] for line in found.commands] == [
        *("extract", "copy-paste", "extract", "train-head", "evaluate")
    ]
    extract = parsed(found.commands[2])
    assert extract.images == out / "pasted-1/images"
    assert extract.views.count == 1
    assert len(list(extract.images.iterdir())) == 12
    assert found.evaluation.num_images == 3
    assert "train-head" in found.next_commands[1]
    shutil.copytree(data, tmp_path / "alone", ignore=shutil.ignore_patterns("*valid*"))
    with pytest.raises(MfdetrError, match="no split to measure on"):
        fit(tmp_path / "alone", tmp_path / "again", copies=1)


def test_a_folder_of_something_else_is_left_alone(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("hello")
    with pytest.raises(MfdetrError, match="is not empty; nothing was touched"):
        fit(data, out)
    assert [p.name for p in out.iterdir()] == ["chapter1.tex"]
    (out / "train.zarr").mkdir()
    (out / "pictures").mkdir()
    (out / "pictures/0.png").write_bytes(b"mine")
    with pytest.raises(MfdetrError, match=r"0\.png was not written by this command"):
        fit(data, out)
    (out / "pictures/0.png").unlink()
    (out / "report.html").write_text("<p>mine</p>")
    with pytest.raises(MfdetrError, match=r"report\.html is there and was not written"):
        fit(data, out)
