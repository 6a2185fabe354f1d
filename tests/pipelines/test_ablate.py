import base64
import io
import json
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from mfdetr_pipelines.ablation.caches import find_caches
from mfdetr_pipelines.ablation.charts import ap_bars, label_curves
from mfdetr_pipelines.ablation.comparison import Comparison, comparison_of
from mfdetr_pipelines.ablation.paper_tables import PAPER_TABLES, paper_table
from mfdetr_pipelines.ablation.plan import RowPlan, plan_rows, seconds_per_step, shared_notes
from mfdetr_pipelines.ablation.report import write_report
from mfdetr_pipelines.ablation.result import RowResult
from mfdetr_pipelines.ablation.rows import (
    AblationRow,
    baseline_rows,
    label_fraction_rows,
    rows_of_file,
    rows_of_table,
    smaller_rows,
    with_settings,
)
from mfdetr_pipelines.ablation.run import run_ablate
from mfdetr_pipelines.ablation.samples import sample_masks
from mfdetr_pipelines.config.ablate import AblateConfig, RowOptions
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.evaluate import run_evaluate
from PIL import Image
from pycocotools import mask as coco_mask

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import CacheError, ConfigError, StoppedError
from mfdetr_cache.evaluation.baselines import ellipse_masks
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_cache.evaluation.detections import Detections
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.input.loader import stream_key
from mfdetr_cache.training.recipes import RECIPES, build_recipe
from mfdetr_cache.training.rows import trainable_rows
from tests.support.browser import require_readable
from tests.support.sams import save_sam

SMALL = {
    "hidden_dim": "8",
    "roi_size": "8",
    "fine_size": "0",
    "image_layers": "1",
    "box_layers": "1",
}


def rows() -> tuple[AblationRow, ...]:
    first = build_recipe("fast", {**SMALL, "batch_size": "4", "mask_scoring": "true"})
    second = replace(first, head=replace(first.head, mask_scoring=False))
    return (AblationRow("with scoring", first), AblationRow("without", second))


def config(drawn_cache: Path, out: Path, **changes: Any) -> AblateConfig:
    settings: dict[str, Any] = {"rows": rows(), "seeds": 2, **changes}
    chosen = with_settings(settings.pop("rows"), {}, {"steps": settings.pop("steps", 2)})
    compared = Comparison("rows", chosen)
    return AblateConfig(
        compared, cache=(str(drawn_cache),), val_cache=(str(drawn_cache),), out=out, **settings
    )


def test_rows_are_trained_measured_and_written(drawn_cache: Path, tmp_path: Path) -> None:
    results = run_ablate(config(drawn_cache, tmp_path), SilentReporter())
    assert [len(r.seeds) for r in results] == [2, 2]
    assert results[0].plan.cost != results[1].plan.cost
    files = write_report(tmp_path, "two heads", results)
    assert [f.suffix for f in files] == [".md", ".csv", ".json", ".pdf", ".html"]
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert document["rows"][0]["name"] == "with scoring"
    assert 0 <= document["rows"][0]["AP"] <= 1
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
    drawn_cache: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    settings = config(drawn_cache, tmp_path, seeds=1)
    results = run_ablate(settings, SilentReporter())
    samples = sample_masks(
        find_caches(settings).by_row, results, tmp_path, scenes_folder / "images", count=2
    )
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


def result(row: AblationRow, *percent: float) -> RowResult:
    metrics = tuple(CocoMetrics(p / 100, *([0.0] * 5)) for p in percent)
    return RowResult(RowPlan(row, None), metrics)


def texts_of(svg: str) -> list[str]:
    return ["".join(t.itertext()) for t in ElementTree.fromstring(svg).findall(".//{*}text")]


def test_a_chart_holds_its_labels_and_a_bar_for_every_row() -> None:
    long = AblationRow(
        "a name that is much longer than a label was allowed to be", rows()[0].recipe
    )
    published = AblationRow("12 epochs", rows()[0].recipe, PAPER_TABLES[10].rows[1])
    failed = RowResult(RowPlan(published, None), problem="the loss is nan")
    chart = ap_bars([result(long, 20, 22), result(rows()[1], 10), failed])
    assert texts_of(chart.to_svg()) == [
        long.name, "without", "12 epochs", "21.0 ± 1.4", "10.0", "paper 46.0"
    ]  # fmt: skip
    widths = [bar.get_width() for bar in chart.figure.axes[0].patches]
    assert widths == pytest.approx([21, 10, np.nan, np.nan, np.nan, 46.0], nan_ok=True)


def test_charts_are_reproducible_and_take_the_colour_of_their_page() -> None:
    results = [result(row, 5, 7) for row in rows()]
    first, second = ap_bars(results), ap_bars(results)
    assert first.to_svg() == second.to_svg()
    assert first.to_pdf() == second.to_pdf()
    assert first.to_pdf().startswith(b"%PDF")
    labels = ElementTree.fromstring(first.to_svg()).findall(".//{*}text")
    assert all("fill: currentColor" in t.attrib["style"] for t in labels)


def test_label_fractions_are_a_curve(tmp_path: Path) -> None:
    made = label_fraction_rows(rows(), [1, 0.01, 0.1])
    results = [result(row, 5 + i, 7 + i) for i, row in enumerate(made)]
    assert label_curves([result(rows()[0], 20, 22)]) is None
    chart = label_curves(results)
    assert chart is not None
    (axes,) = chart.figure.axes
    # From the fewest masks to the most; 1 % was the second row (AP 7), 10 % the third, all the
    # first.
    first, second = (line.get_xydata() for line in axes.lines)
    assert first == pytest.approx(np.array([[0.01, 7], [0.1, 8], [1, 6]]))
    assert second == pytest.approx(np.array([[0.01, 10], [0.1, 11], [1, 9]]))
    assert axes.get_xscale() == "log"
    texts = texts_of(chart.to_svg())
    assert {"1 %", "10 %", "100 %", "with scoring", "without"} <= set(texts)
    files = write_report(tmp_path, "labels", results)
    assert {"labels.svg", "labels.pdf", "ablation.pdf"} <= {f.name for f in files}
    assert (tmp_path / "labels.svg").read_text() == chart.to_svg()
    assert "![mask AP against label fraction](labels.svg)" in (tmp_path / "ablation.md").read_text()


def test_a_page_escapes_what_it_is_given_and_has_no_name_twice(tmp_path: Path) -> None:
    row = AblationRow("<script>&", rows()[0].recipe, note="<b>")
    made = label_fraction_rows([row, rows()[1]], [0.1, 1])
    write_report(tmp_path, "<i>", [result(r, 5, 6) for r in made])
    page = (tmp_path / "ablation.html").read_text()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "<td>&lt;script&gt;&amp;, 10 % of the masks</td>" in page
    # Charts of one page would share the names of their groups.
    assert page.count("<svg") == 2
    assert "<g id=" not in page


def test_smaller_heads_than_the_papers_are_rows() -> None:
    made = smaller_rows((AblationRow("paper", build_recipe("paper", {})), *baseline_rows(("box",))))
    changes = [(r.recipe.head.hidden_dim, r.recipe.head.roi_size) for r in made[:5]]
    assert changes == [(128, 32), (32, 32), (16, 32), (8, 32), (128, 8)]
    assert [r.name for r in made[1:]] == [
        "paper, d=32",
        "paper, d=16",
        "paper, d=8",
        "paper, RoI 8 x 8",
        "box as mask",
    ]
    costs = [p.cost.parameters for p in plan_rows(made) if p.cost is not None]
    assert costs[0] > costs[1] > costs[2] > costs[3]


def test_the_detectors_hours_are_counted_when_given(drawn_cache: Path, tmp_path: Path) -> None:
    settings = config(drawn_cache, tmp_path, seeds=1, detector_hours=12.5)
    results = run_ablate(settings, SilentReporter())
    for r in results:
        assert r.total_hours == 12.5 + r.train_seconds / 3600
        assert r.to_dict()["total_hours"] == r.total_hours
    write_report(tmp_path, "cost", results)
    assert "| total h |" in (tmp_path / "ablation.md").read_text()
    without = run_ablate(config(drawn_cache, tmp_path, seeds=1), SilentReporter())
    write_report(tmp_path, "cost", without)
    assert "total h" not in (tmp_path / "ablation.md").read_text()
    with pytest.raises(ConfigError, match="--detector-hours -1: give 0 or more"):
        run_ablate(config(drawn_cache, tmp_path, detector_hours=-1), SilentReporter())


def test_rows_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.toml"
    path.write_text(
        '[[row]]\nname = "narrow"\n'
        "set = { hidden_dim = 32, drops = [0.5, 0.75], mask_scoring = true }\n"
        '[[row]]\nname = "the paper"\nrecipe = "paper"\n'
    )
    narrow, paper = rows_of_file(path)
    assert narrow.recipe.head.hidden_dim == 32
    assert narrow.recipe.train.drops == (0.5, 0.75)
    assert narrow.recipe.head.mask_scoring
    assert paper.recipe.name == "paper"
    for text, message in (
        ("[[row", "is not TOML"),
        ("x = 1", r"has no \[\[row\]\]"),
        ("[[row]]\nrecipe = 'fast'", "row 1 has no name"),
        ("[[row]]\nname = 'a'\nsets = {}", "row 1 has the unknown key 'sets'"),
        ("[[row]]\nname = 'a'\nset = { lrr = 1 }", "row 'a': --set: unknown setting 'lrr'"),
        ("[[row]]\nname = 'a'\n[[row]]\nname = 'a'", "two rows are called 'a'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            rows_of_file(path)
    with pytest.raises(ConfigError, match="No such file"):
        rows_of_file(tmp_path / "absent.toml")


def test_fewer_masks_are_nested_and_every_fraction_is_a_row(drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)

    def rows_of(fraction: float, seed: int) -> set[int]:
        return set(trainable_rows(cache, TrainConfig(label_fraction=fraction, seed=seed)))

    kept = {f: rows_of(f, 3) for f in (0.01, 0.25, 0.5, 1.0)}
    assert [len(k) for k in kept.values()] == [1, 2, 4, 8]
    assert kept[0.01] < kept[0.25] < kept[0.5] < kept[1.0]
    assert rows_of(0.5, 4) != kept[0.5]
    made = label_fraction_rows(rows()[:1], [0.1, 1])
    names = [r.name for r in made]
    assert names == ["with scoring, 10 % of the masks", "with scoring, 100 % of the masks"]
    with pytest.raises(ConfigError, match="--label-fraction 0: give a number above 0"):
        label_fraction_rows(rows(), [0])


def test_steps_are_timed_for_a_dry_run(drawn_cache: Path, tmp_path: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    plans = plan_rows(rows(), cache)
    seconds = seconds_per_step(plans, cache, "cpu")
    assert set(seconds) == {"with scoring", "without"}
    assert all(s > 0 for s in seconds.values())


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


def test_the_same_command_goes_on(drawn_cache: Path, tmp_path: Path) -> None:
    """Stopped in the second seed: nothing is trained twice, and the results are the same."""
    reporter = StoppedReporter(3)
    with pytest.raises(StoppedError, match="the same command goes on from there"):
        run_ablate(config(drawn_cache, tmp_path / "a"), reporter)
    # Two steps of both heads with seed 0, one with seed 1.
    assert reporter.steps == [2, 1]
    again = StoppedReporter(0)
    resumed = run_ablate(config(drawn_cache, tmp_path / "a"), again)
    assert again.steps == [1]
    whole = run_ablate(config(drawn_cache, tmp_path / "b"), SilentReporter())
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


def test_another_ablation_in_the_folder_is_refused(drawn_cache: Path, tmp_path: Path) -> None:
    run_ablate(config(drawn_cache, tmp_path, seeds=1), SilentReporter())
    with_threads = with_settings(rows(), {}, {"num_threads": 3})
    again = run_ablate(config(drawn_cache, tmp_path, rows=with_threads, seeds=1), SilentReporter())
    assert [r.problem for r in again] == ["", ""]
    results = run_ablate(config(drawn_cache, tmp_path, seeds=1, steps=3), SilentReporter())
    assert all("of another ablation: train.steps was 2 and is 3" in r.problem for r in results)


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
        "mfdetr_pipelines.ablation.group.measure",
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
    drawn_cache: Path, tmp_path: Path
) -> None:
    settings = config(drawn_cache, tmp_path, seeds=1)
    before = run_ablate(settings, SilentReporter())
    for path in tmp_path.rglob("result.json"):
        document = json.loads(path.read_text())
        del document["identity"]["train"]["val_split"]
        path.write_text(json.dumps(document))
    after = run_ablate(settings, SilentReporter())
    assert [r.problem for r in after] == ["", ""]
    assert [r.seeds for r in after] == [r.seeds for r in before]


def test_rows_that_would_write_over_one_another_are_refused(
    drawn_cache: Path, tmp_path: Path
) -> None:
    twice = label_fraction_rows(rows()[:1], [0.5, 0.5])
    alike = (rows()[0], replace(rows()[1], name="With-scoring"))
    for chosen in (twice, alike):
        with pytest.raises(ConfigError, match="would share .*; give each once"):
            run_ablate(config(drawn_cache, tmp_path, rows=chosen), SilentReporter())
    assert not (tmp_path / "rows").exists()


def test_a_row_with_nothing_to_train_stays_so_or_says_why(
    drawn_cache: Path, tmp_path: Path
) -> None:
    """Here the encoder is 32 wide and C1 16: only the rows without C1 can do without a neck."""
    chosen = rows_of_table(PAPER_TABLES[1])
    results = run_ablate(config(drawn_cache, tmp_path, rows=chosen, seeds=2), SilentReporter())
    wanted = "nothing to train in this row, but C1 has 16 channels and the encoder 32"
    assert [wanted in r.problem for r in results] == [False, False, True, True]
    for found in results[:2]:
        assert found.plan.cost is not None
        assert found.plan.cost.parameters == 0
        assert found.train_seconds == 0
        assert len(found.seeds) == 1
        assert found.plan.row.note == "d=32, the detector's own width"
    # Whoever asks for a width gets it, and with it a mapper to train.
    plans = plan_rows(
        with_settings(chosen[:1], {"hidden_dim": 64}, {}), FeatureCache.open(drawn_cache)
    )
    assert plans[0].is_trained


def test_rows_in_epochs_show_every_image_equally_often(drawn_cache: Path) -> None:
    batches, lengths = (rows_of_table(PAPER_TABLES[n]) for n in (13, 10))
    plans = plan_rows(batches)
    assert [p.row.recipe.train.batch_size for p in plans] == [2, 4, 8]
    assert [p.epochs for p in plans] == [6, 6, 6]
    # The paper trains for 88,500 steps.
    assert plans[2].row.recipe.train.steps == pytest.approx(88_500, rel=0.01)
    assert [p.epochs for p in plan_rows(lengths)] == [6, 12]

    def steps(plans: Sequence[RowPlan]) -> list[int]:
        return [p.row.recipe.train.steps for p in plans]

    cache = FeatureCache.open(drawn_cache)  # of eight images
    assert steps(plan_rows(batches, cache)) == [24, 12, 6]
    assert steps(plan_rows(batches, cache, max_steps=100)) == [100, 50, 25]
    assert steps(plan_rows(lengths, cache, max_steps=100)) == [50, 100]
    assert steps(plan_rows((*lengths, rows()[0]), cache, max_steps=100)) == [50, 100, 100]
    assert steps(plan_rows(with_settings(lengths, {}, {"steps": 3}), cache)) == [3, 3]
    with pytest.raises(ConfigError, match="--max-steps must be 1 or more, not 0"):
        plan_rows(lengths, cache, max_steps=0)


def test_a_row_whose_settings_cannot_be_is_a_row_that_says_why() -> None:
    chosen = with_settings(rows_of_table(PAPER_TABLES[1]), {"box_layers": 1}, {})
    plans = plan_rows(chosen)
    assert ["roialign=false leaves no regions" in p.problem for p in plans] == [True, False] * 2


# The others have caches of their own: test_ablate_caches.py.
ONE_CACHE = [
    number
    for number, table in PAPER_TABLES.items()
    if not table.needs and not any(row.extract or row.tune for row in table.rows)
]


@pytest.mark.parametrize("number", ONE_CACHE)
def test_every_row_of_the_papers_tables_is_trained_and_measured(
    number: int, drawn_cache: Path, tmp_path: Path
) -> None:
    """On a detector whose widths are none of the paper's, a step each; cells as few as can be."""
    chosen = rows_of_table(PAPER_TABLES[number])
    small = {"hidden_dim": 16} if number == 9 else {"roi_size": 8}
    compared = Comparison("rows", with_settings(chosen, small, {}))
    settings = AblateConfig(
        compared, cache=(str(drawn_cache),), val_split=4, out=tmp_path, max_steps=1
    )
    results = run_ablate(settings, SilentReporter())
    without_neck = [n for n, r in zip(range(99), results, strict=False) if r.problem]
    assert without_neck == {1: [2, 3], 2: [0]}.get(number, [])
    assert all(r.problem or r.mean() is not None for r in results)
    if published := PAPER_TABLES[number].published:
        write_report(tmp_path / "report", "Systems", results, published=published)
        text = (tmp_path / "report" / "ablation.md").read_text()
        assert "| Mask DINO | R50 | 50 | 1404 | 50.5 | 46.0 |" in text
        document = json.loads((tmp_path / "report" / "ablation.json").read_text())
        assert len(document["published"]) == len(published)
        assert "Mask2Former Swin-L" in (tmp_path / "report" / "ablation.html").read_text()


def test_a_branch_over_the_whole_image_is_trained_an_image_at_a_time(
    drawn_cache: Path, tmp_path: Path
) -> None:
    chosen = with_settings(
        rows_of_table(PAPER_TABLES[1])[:1], {"hidden_dim": 64, "image_layers": 1}, {"batch_size": 2}
    )
    (refused,) = run_ablate(
        config(drawn_cache, tmp_path / "a", rows=chosen, seeds=1), SilentReporter()
    )
    assert "one image at a time; pass --set accumulate=2" in refused.problem
    chosen = with_settings(chosen, {}, {"accumulate": 2})
    (trained,) = run_ablate(
        config(drawn_cache, tmp_path / "b", rows=chosen, seeds=1), SilentReporter()
    )
    assert trained.problem == ""
    assert trained.mean() is not None


def test_rows_are_fitted_to_the_detector(drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    plans = plan_rows(rows_of_table(PAPER_TABLES[5]), cache)
    assert all("neck added: C1 has 16 channels, the encoder 32" in p.row.note for p in plans)
    named = [(p.row.name, p.row.note) for p in plans]
    assert shared_notes(named) == [f"all rows: {plans[0].row.note}"]
    mixed = [("a", "one"), ("b", ""), ("c", "one"), ("d", "two")]
    assert shared_notes(mixed) == ["a, c: one", "d: two"]
    assert all(p.cost is not None for p in plans)


def test_wrong_input_is_named(drawn_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--table 17: the paper has 1 to 16"):
        paper_table(17)
    with pytest.raises(ConfigError, match="--seeds 0: give 1 or more"):
        run_ablate(config(drawn_cache, tmp_path, seeds=0), SilentReporter())
    (tmp_path / "rows/with-scoring/seed-0").mkdir(parents=True)
    (tmp_path / "rows/with-scoring/seed-0/result.json").write_text("{")
    results = run_ablate(config(drawn_cache, tmp_path, seeds=1), SilentReporter())
    assert "result.json is damaged" in results[0].problem


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


def test_branches_of_other_papers_learn_from_one_read_in_equal_steps() -> None:
    compared = comparison_of(RowOptions(branches=True, baseline=("sam",)))
    heads = [row for row in compared.rows if not row.baseline]
    # The recipe of every head but the paper's own and the demonstration's, once.
    assert sorted(r.recipe.name for r in heads) == sorted(set(RECIPES) - {"paper", "demo"})
    assert len({(stream_key(r.recipe.train), r.recipe.train.steps) for r in heads}) == 1
    assert [r.baseline for r in compared.rows if r.baseline] == ["box", "oracle", "sam"]
    plans = plan_rows(compared.rows)
    assert [p.problem for p in plans] == [""] * len(plans)
    assert len({p.cost.macs for p in plans if p.cost is not None}) == len(heads)
    # Published with its whole detector, none of it measured here.
    assert all(20 < p.AP < 60 and p.source for p in compared.published)


def test_an_ellipse_has_its_area() -> None:
    boxes = torch.tensor([[10.0, 20.0, 90.0, 60.0]])
    one = torch.zeros(1, dtype=torch.long)
    rle = ellipse_masks(Detections(one, one, torch.ones(1), boxes), (100, 120))[0]
    # pi a b; the outline of some 200 pixels is right to a pixel on average.
    assert abs(coco_mask.area(rle) - np.pi * 40 * 20) < 20
    assert coco_mask.toBbox(rle).tolist() == [10, 20, 80, 40]
