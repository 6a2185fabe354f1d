import base64
import gzip
import io
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mfdetr_pipelines.ablation.caches import find_caches
from mfdetr_pipelines.ablation.comparison import Comparison, paper_table
from mfdetr_pipelines.ablation.report import write_report
from mfdetr_pipelines.ablation.rows import (
    AblationRow,
    baseline_rows,
    with_settings,
)
from mfdetr_pipelines.ablation.run import run_ablate
from mfdetr_pipelines.ablation.samples import sample_masks
from mfdetr_pipelines.cache.relabel import run_relabel
from mfdetr_pipelines.config.cache import RelabelConfig
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.evaluate import run_evaluate
from PIL import Image
from pycocotools import mask as coco_mask

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import CacheError, ConfigError, HeadError, StoppedError
from mfdetr_cache.evaluation.baselines import ellipse_masks
from mfdetr_cache.evaluation.detections import Detections
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.recipes import build_recipe
from tests.support import scenes
from tests.support.ablations import SMALL, config, rows
from tests.support.browser import require_readable
from tests.support.sams import save_sam


@pytest.fixture(scope="module")
def done(drawn_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an ablation that has ended, with two seeds; do not change it."""
    folder = tmp_path_factory.mktemp("done")
    run_ablate(config(drawn_cache, folder), SilentReporter())
    return folder


def test_rows_are_trained_measured_and_written(
    drawn_cache: Path, tmp_path: Path, done: Path
) -> None:
    results = run_ablate(config(drawn_cache, done), SilentReporter())
    assert [len(r.seeds) for r in results] == [2, 2]
    assert results[0].row.cost != results[1].row.cost
    files = write_report(tmp_path, "two heads", results)
    assert [f.suffix for f in files] == [".md", ".csv", ".json", ".pdf", ".html"]
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert document["rows"][0]["name"] == "with scoring"
    assert document["rows"][0]["AP"] == results[0].mean()
    table = (tmp_path / "ablation.md").read_text().splitlines()
    assert table[2].startswith("| row | AP | vs first |")
    assert "±" in table[4]
    assert "<svg" in (tmp_path / "ablation.html").read_text()
    assert results[0].against_first is None
    found = results[1].against_first
    assert found is not None
    assert found.low <= found.difference <= found.high
    difference = results[1].mean() - results[0].mean()  # type: ignore[operator]
    assert found.difference == pytest.approx(difference, abs=1e-9)


def test_sample_masks_of_every_row_are_drawn(
    drawn_cache: Path, scenes_folder: Path, tmp_path: Path, done: Path
) -> None:
    settings = config(drawn_cache, done, seeds=1)
    results = run_ablate(settings, SilentReporter())
    caches = find_caches(settings).by_row
    samples = sample_masks(caches, results, done, scenes_folder / "images", count=2)
    assert len(samples) == 2
    assert [p.title for p in samples[0].panels] == ["annotation", "with scoring", "without"]
    assert len({p.image.size for p in samples[0].panels}) == 1
    write_report(tmp_path, "two heads", results, samples)
    page = (tmp_path / "ablation.html").read_text()
    pictures = re.findall(r'data:image/jpeg;base64,([^"]+)" alt="([^"]+)"', page)
    assert [title for _, title in pictures] == ["annotation", "with scoring", "without"] * 2
    assert all(Image.open(io.BytesIO(base64.b64decode(p))).height >= 200 for p, _ in pictures)
    # Nothing is fetched: the page is one file.
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", page)
    require_readable(page, tmp_path)


def test_the_detectors_hours_are_counted_when_given(
    drawn_cache: Path, tmp_path: Path, done: Path
) -> None:
    settings = config(drawn_cache, done, seeds=1, detector_hours=12.5)
    results = run_ablate(settings, SilentReporter())
    for r in results:
        assert r.total_hours == 12.5 + r.train_seconds / 3600
        assert r.to_dict()["total_hours"] == r.total_hours
    write_report(tmp_path, "cost", results)
    assert "| total h |" in (tmp_path / "ablation.md").read_text()
    without = run_ablate(config(drawn_cache, done, seeds=1), SilentReporter())
    write_report(tmp_path, "cost", without)
    assert "total h" not in (tmp_path / "ablation.md").read_text()
    with pytest.raises(ConfigError, match="--detector-hours -1: give 0 or more"):
        run_ablate(config(drawn_cache, tmp_path, detector_hours=-1), SilentReporter())


class StoppedReporter(SilentReporter):
    """Asks to stop in the course of a step; counts the steps of each training."""

    def __init__(self, stop_at: int) -> None:
        super().__init__()
        self.steps: list[int] = []
        self._left = stop_at
        self._task = ""

    def start(self, task: str, total: int, unit: str, done: int = 0) -> None:
        self._task = task
        if task == "train":
            self.steps.append(0)

    def advance(self, count: int = 1, *, num_bytes: int = 0, note: str = "") -> None:
        if self._task == "train":
            self.steps[-1] += 1
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGTERM)


def test_the_same_command_goes_on(drawn_cache: Path, tmp_path: Path, done: Path) -> None:
    """Stopped in the second seed: nothing is trained twice, and the results are the same."""
    reporter = StoppedReporter(3)
    with pytest.raises(StoppedError, match="the same command goes on from there"):
        run_ablate(config(drawn_cache, tmp_path / "a"), reporter)
    # Two steps of both heads with seed 0, one with seed 1.
    assert reporter.steps == [2, 1]
    again = StoppedReporter(0)
    resumed = run_ablate(config(drawn_cache, tmp_path / "a"), again)
    assert again.steps == [1]
    whole = run_ablate(config(drawn_cache, done), SilentReporter())
    assert [r.seeds for r in resumed] == [r.seeds for r in whole]


def test_a_row_that_fails_says_why_and_the_others_go_on(drawn_cache: Path, tmp_path: Path) -> None:
    broken = build_recipe("fast", {**SMALL, "fuse_stride": "4", "lr": "1e9"})
    chosen = (AblationRow("no such level", broken), rows()[0])
    results = run_ablate(config(drawn_cache, tmp_path, rows=chosen, seeds=1), SilentReporter())
    assert "fuse_stride 4: the levels have strides" in results[0].problem
    assert results[0].mean() is None
    assert results[1].mean() is not None
    write_report(tmp_path, "one broken", results)
    assert "fuse_stride 4" in (tmp_path / "ablation.md").read_text()


def test_another_ablation_in_the_folder_is_refused(drawn_cache: Path, done: Path) -> None:
    with_threads = with_settings(rows(), {}, {"num_threads": 3})
    again = run_ablate(config(drawn_cache, done, rows=with_threads, seeds=1), SilentReporter())
    assert [r.problem for r in again] == ["", ""]
    results = run_ablate(config(drawn_cache, done, seeds=1, steps=3), SilentReporter())
    assert all("of another ablation: train.steps was 2 and is 3" in r.problem for r in results)


def test_results_of_other_annotations_are_refused(
    drawn_cache: Path, scenes_folder: Path, tmp_path: Path, done: Path
) -> None:
    """A cache that was relabelled is the same cache: its id does not change."""
    document = scenes.load_annotations(scenes_folder)
    del document["annotations"][0]
    annotations = scenes.save_annotations(tmp_path, document)
    cache = shutil.copytree(drawn_cache, tmp_path / "c.zarr")
    run_relabel(RelabelConfig(str(cache), annotations), SilentReporter())
    for training, measured in ((cache, drawn_cache), (drawn_cache, cache)):
        changed = replace(
            config(drawn_cache, done, seeds=1), cache=(str(training),), val_cache=(str(measured),)
        )
        results = run_ablate(changed, SilentReporter())
        assert all("of another ablation: annotations was None" in r.problem for r in results)
    before = replace(config(drawn_cache, done, seeds=1), cache=(f"{cache}@0",))
    assert [r.problem for r in run_ablate(before, SilentReporter())] == ["", ""]


def test_settings_are_chosen_on_images_left_out_of_training(
    drawn_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache.open(drawn_cache)
    learned, seen = FeatureCache.open(drawn_cache).split(4)
    assert learned.rows == tuple(r for r in cache.rows if (r + 1) % 4)
    assert len(seen) == 2
    assert sorted((*learned.rows, *seen.rows)) == list(cache.rows)
    with pytest.raises(CacheError, match="has 8 images: it cannot keep every 9th"):
        cache.split(9)
    read: list[int] = []
    real = FeatureCache.read

    def counted(self: FeatureCache, row: int, *arguments: Any, **options: Any) -> Any:
        read.append(row)
        return real(self, row, *arguments, **options)

    monkeypatch.setattr(FeatureCache, "read", counted)
    monkeypatch.setattr(
        "mfdetr_pipelines.ablation.training.measure",
        lambda *_, **__: pytest.fail("not before it is trained"),
    )
    split = with_settings(rows()[:1], {}, {"val_split": 4, "steps": 6, "num_threads": 1})
    settings = replace(config(drawn_cache, tmp_path, rows=split, seeds=1), val_cache=())
    with pytest.raises(pytest.fail.Exception, match="not before it is trained"):
        run_ablate(settings, SilentReporter())
    assert set(read) == set(learned.rows)
    monkeypatch.undo()
    (found,) = run_ablate(settings, SilentReporter())
    assert found.problem == ""
    # The head's own evaluation knows which images it has not seen.
    folder = tmp_path / "rows/with-scoring/seed-0"
    reporter = SilentReporter()
    alone = run_evaluate(EvaluateConfig(drawn_cache, folder), reporter)
    assert reporter.messages == ["measuring on the 2 images that the training left out"]
    assert alone.num_images == 2
    assert alone.boundary is not None
    assert (found.mean(), found.boundary, found.box) == (
        alone.mask.AP,
        alone.boundary.AP,
        alone.box.AP,
    )
    mixed = (*split, *with_settings(rows()[1:], {}, {"val_split": 2}))
    for wrong in (rows(), mixed):
        other = replace(settings, comparison=Comparison("rows", wrong), out=tmp_path / "b")
        with pytest.raises(ConfigError, match="give --val-cache, or --val-split N"):
            run_ablate(other, SilentReporter())


def test_results_from_before_a_setting_existed_are_its_default(
    drawn_cache: Path, tmp_path: Path, done: Path
) -> None:
    settings = config(drawn_cache, tmp_path, seeds=1)
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    before = run_ablate(settings, SilentReporter())
    for path in tmp_path.rglob("result.json"):
        document = json.loads(path.read_text())
        del document["identity"]["train"]["val_split"], document["sha256"]
        path.write_text(json.dumps(document))
    after = run_ablate(settings, SilentReporter())
    assert [r.problem for r in after] == ["", ""]
    assert [r.seeds for r in after] == [r.seeds for r in before]


def test_a_stored_result_that_was_changed_is_no_result(
    drawn_cache: Path, tmp_path: Path, done: Path
) -> None:
    settings = config(drawn_cache, tmp_path, seeds=1)
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    first, second = sorted(tmp_path.rglob("seed-0/result.json"))
    masks, of_other = (path.with_name("masks.json.gz") for path in (second, first))
    for wrong in (of_other.read_bytes(), gzip.compress(b"[" * 200_000)):
        masks.write_bytes(wrong)
        with pytest.raises(HeadError, match=r"masks\.json\.gz is damaged"):
            run_ablate(settings, SilentReporter())
    changed = first.read_bytes().replace(b'"AP": 0.', b'"AP": 9.', 1)
    assert changed != first.read_bytes()
    first.write_bytes(changed)
    one, other = run_ablate(settings, SilentReporter())
    assert "result.json is damaged" in one.problem
    assert not other.problem


def test_wrong_input_is_named(drawn_cache: Path, tmp_path: Path, done: Path) -> None:
    with pytest.raises(ConfigError, match="--table 17: the paper has 1 to 16"):
        paper_table(17)
    with pytest.raises(ConfigError, match="--seeds 0: give 1 or more"):
        run_ablate(config(drawn_cache, tmp_path, seeds=0), SilentReporter())
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    (tmp_path / "rows/with-scoring/seed-0/result.json").write_text("{")
    path = tmp_path / "rows/without/seed-0/result.json"
    document = json.loads(path.read_text())
    del document["mask"]["AP"]
    path.write_text(json.dumps(document))
    for result in run_ablate(config(drawn_cache, tmp_path, seeds=1), SilentReporter()):
        assert "result.json is damaged" in result.problem


def test_baselines_are_rows_on_the_same_detections(
    drawn_cache: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    save_sam("sam", tmp_path / "sam")
    chosen = baseline_rows(("box", "ellipse", "oracle", "sam"))
    sam = {"sam_weights": str(tmp_path / "sam"), "images": scenes_folder / "images"}
    results = run_ablate(
        config(drawn_cache, tmp_path / "a", rows=chosen, seeds=1, **sam), SilentReporter()
    )
    assert [r.problem for r in results] == [""] * 4
    found = dict(zip(("box", "ellipse", "oracle", "sam"), (r.mean() for r in results), strict=True))
    head = build_recipe("fast", {**SMALL, "batch_size": "4"})
    other = config(drawn_cache, tmp_path / "b", rows=(AblationRow("h", head),), seeds=1)
    run_ablate(other, SilentReporter())
    evaluated = run_evaluate(
        EvaluateConfig(drawn_cache, tmp_path / "b/rows/h/seed-0"), SilentReporter()
    )
    assert evaluated.floor is not None
    assert evaluated.ceiling is not None
    assert found["box"] == evaluated.floor.AP
    assert found["oracle"] == evaluated.ceiling.AP
    assert all(r.box == evaluated.box.AP for r in results)
    # Its IoU is the smaller of that of the masks and that of their edges.
    assert all(r.boundary is not None and r.boundary <= r.mean() for r in results)  # type: ignore[operator]
    assert all(f is not None and 0 <= f <= 1 for f in found.values())
    write_report(tmp_path, "baselines", results)
    without = run_ablate(
        config(drawn_cache, tmp_path / "c", rows=chosen[3:], seeds=1), SilentReporter()
    )
    assert without[0].problem == "--baseline sam needs --sam-weights and --images"


def test_what_has_no_chance_in_it_is_measured_once(drawn_cache: Path, tmp_path: Path) -> None:
    chosen = (*baseline_rows(("box",)), rows()[1])
    results = run_ablate(config(drawn_cache, tmp_path, rows=chosen), SilentReporter())
    assert [r.problem for r in results] == ["", ""]
    assert [len(r.seeds) for r in results] == [1, 2]
    assert len(list((tmp_path / "rows").rglob("result.json"))) == 3
    assert results[1].against_first is not None
    files = write_report(tmp_path, "one fixed row", results)
    assert all(f.is_file() for f in files)


def test_an_ellipse_has_its_area() -> None:
    boxes = torch.tensor([[10.0, 20.0, 90.0, 60.0]])
    one = torch.zeros(1, dtype=torch.long)
    rle = ellipse_masks(Detections(one, one, torch.ones(1), boxes), (100, 120))[0]
    # pi a b; the outline of some 200 pixels is right to a pixel on average.
    assert abs(coco_mask.area(rle) - np.pi * 40 * 20) < 20
    assert coco_mask.toBbox(rle).tolist() == [10, 20, 80, 40]
