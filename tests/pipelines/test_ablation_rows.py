import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from mfdetr_pipelines.ablation.comparison import PAPER_TABLES, Comparison, comparison_of
from mfdetr_pipelines.ablation.plan import plan_rows, seconds_per_step, shared_notes
from mfdetr_pipelines.ablation.report import write_report
from mfdetr_pipelines.ablation.rows import (
    AblationRow,
    baseline_rows,
    label_fraction_rows,
    rows_of_file,
    smaller_rows,
    with_settings,
)
from mfdetr_pipelines.ablation.run import run_ablate
from mfdetr_pipelines.config.ablate import AblateConfig, RowOptions

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.input.loader import stream_key
from mfdetr_cache.training.order import trainable_rows
from mfdetr_cache.training.recipes import RECIPES, build_recipe
from tests.support.ablations import config, rows


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
        ("row = [1]", r"row\[0\] is 1 and not an object"),
        ("[row]\nname = 'a'", r"row is \{'name': 'a'\} and not a list"),
        ("[[row]]\nrecipe = 'fast'", r"row\[0\] has no 'name'"),
        ("[[row]]\nname = 'a'\nsets = {}", r"row\[0\] has the unknown key 'sets'"),
        ("[[row]]\nname = 'a'\nset = { lrr = 1 }", r"\('a'\): --set: unknown setting 'lrr'"),
        ("[[row]]\nname = 'a'\nset = 'lr=1'", r"\('a'\): set is 'lr=1' and not an object"),
        ("[[row]]\nname = 'a'\nrecipe = 3", r"\('a'\): recipe is 3 and not text"),
        ("[[row]]\nname = 'a'\ncache = ['c']", r"cache is \['c'\] and not text"),
        ("[[row]]\nname = 'a'\nextract = { view = 2 }", "unknown setting 'view'; use encoder"),
        ("[[row]]\nname = 'a'\nextract = { views = true }", "views is True and not a whole num"),
        ("[[row]]\nname = 'a'\nextract = { view_policy = 'lsj' }", "'lsj' and not one of deform"),
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
    chosen = PAPER_TABLES[1].rows
    results = run_ablate(config(drawn_cache, tmp_path, rows=chosen, seeds=2), SilentReporter())
    wanted = "nothing to train in this row, but C1 has 16 channels and the encoder 32"
    assert [wanted in r.problem for r in results] == [False, False, True, True]
    for found in results[:2]:
        assert found.row.cost is not None
        assert found.row.cost.parameters == 0
        assert found.train_seconds == 0
        assert len(found.seeds) == 1
        assert found.row.note == "d=32, the detector's own width"
    # Whoever asks for a width gets it, and with it a mapper to train.
    plans = plan_rows(
        with_settings(chosen[:1], {"hidden_dim": 64}, {}), FeatureCache.open(drawn_cache)
    )
    assert plans[0].is_trained


def test_rows_in_epochs_show_every_image_equally_often(drawn_cache: Path) -> None:
    batches, lengths = (PAPER_TABLES[n].rows for n in (13, 10))
    plans = plan_rows(batches)
    assert [p.recipe.train.batch_size for p in plans] == [2, 4, 8]
    assert [p.passes for p in plans] == [6, 6, 6]
    # The paper trains for 88,500 steps.
    assert plans[2].recipe.train.steps == pytest.approx(88_500, rel=0.01)
    assert [p.passes for p in plan_rows(lengths)] == [6, 12]

    def steps(plans: Sequence[AblationRow]) -> list[int]:
        return [p.recipe.train.steps for p in plans]

    cache = FeatureCache.open(drawn_cache)  # of eight images
    assert steps(plan_rows(batches, cache)) == [24, 12, 6]
    assert steps(plan_rows(batches, cache, max_steps=100)) == [100, 50, 25]
    assert steps(plan_rows(lengths, cache, max_steps=100)) == [50, 100]
    assert steps(plan_rows((*lengths, rows()[0]), cache, max_steps=100)) == [50, 100, 100]
    assert steps(plan_rows(with_settings(lengths, {}, {"steps": 3}), cache)) == [3, 3]
    with pytest.raises(ConfigError, match="--max-steps must be 1 or more, not 0"):
        plan_rows(lengths, cache, max_steps=0)


def test_a_row_whose_settings_cannot_be_is_a_row_that_says_why() -> None:
    chosen = with_settings(PAPER_TABLES[1].rows, {"box_layers": 1}, {})
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
    chosen = PAPER_TABLES[number].rows
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
        PAPER_TABLES[1].rows[:1], {"hidden_dim": 64, "image_layers": 1}, {"batch_size": 2}
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
    plans = plan_rows(PAPER_TABLES[5].rows, cache)
    assert all("neck added: C1 has 16 channels, the encoder 32" in p.note for p in plans)
    named = [(p.name, p.note) for p in plans]
    assert shared_notes(named) == [f"all rows: {plans[0].note}"]
    mixed = [("a", "one"), ("b", ""), ("c", "one"), ("d", "two")]
    assert shared_notes(mixed) == ["a, c: one", "d: two"]
    assert all(p.cost is not None for p in plans)


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
