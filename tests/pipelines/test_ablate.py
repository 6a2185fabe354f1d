import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mfdetr_pipelines import ablate as ablate_module
from mfdetr_pipelines.ablate import (
    AblateConfig,
    AblationRow,
    plan_rows,
    rows_of_table,
    run_ablate,
    with_settings,
)
from mfdetr_pipelines.ablation_report import write_report
from mfdetr_pipelines.paper_tables import PAPER_TABLES, paper_table
from mfdetr_pipelines.recipes import build_recipe

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import ConfigError, StoppedError
from mfdetr_cache.protocols import SilentReporter

SMALL = {"hidden_dim": "8", "roi_size": "8", "image_layers": "1", "box_layers": "1"}


def rows() -> tuple[AblationRow, ...]:
    first = build_recipe("fast", {**SMALL, "batch_size": "4", "mask_scoring": "true"})
    second = replace(first, head=replace(first.head, mask_scoring=False))
    return (AblationRow("with scoring", first), AblationRow("without", second))


def config(drawn_cache: Path, out: Path, **changes: Any) -> AblateConfig:
    settings: dict[str, Any] = {"rows": rows(), "seeds": 2, "max_steps": 2, **changes}
    return AblateConfig(cache=drawn_cache, val_cache=drawn_cache, out=out, **settings)


def test_rows_are_trained_measured_and_written(drawn_cache: Path, tmp_path: Path) -> None:
    results = run_ablate(config(drawn_cache, tmp_path), SilentReporter())
    assert [len(r.seeds) for r in results] == [2, 2]
    assert results[0].plan.cost != results[1].plan.cost
    files = write_report(tmp_path, "two heads", results)
    assert [f.suffix for f in files] == [".md", ".csv", ".json", ".html"]
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert document["rows"][0]["name"] == "with scoring"
    assert 0 <= document["rows"][0]["AP"] <= 1
    table = (tmp_path / "ablation.md").read_text().splitlines()
    assert table[2].startswith("| row | AP |")
    assert "±" in table[4]
    assert "<svg" in (tmp_path / "ablation.html").read_text()


def test_the_same_command_goes_on(
    drawn_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second row: nothing is trained twice, and the results are the same."""
    real, calls = ablate_module.run_train_head, []

    def counted(settings: Any, reporter: Any) -> Any:
        calls.append(settings.out.parent.name)
        if len(calls) == 3:
            real(replace(settings, max_steps=1), reporter)
            raise StoppedError("stopped")
        return real(settings, reporter)

    monkeypatch.setattr(ablate_module, "run_train_head", counted)
    with pytest.raises(StoppedError):
        run_ablate(config(drawn_cache, tmp_path / "a"), SilentReporter())
    assert calls == ["with-scoring", "with-scoring", "without"]
    # What the stopped training left is another length; a killed one leaves its own.
    for file in (tmp_path / "a/rows/without/seed-0").iterdir():
        file.unlink()
    resumed = run_ablate(config(drawn_cache, tmp_path / "a"), SilentReporter())
    assert calls[3:] == ["without", "without"]
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
    results = run_ablate(config(drawn_cache, tmp_path, seeds=1, max_steps=3), SilentReporter())
    assert all("of another ablation: train.steps was 2 and is 3" in r.problem for r in results)


def test_training_free_rows_are_measured_without_training(
    drawn_cache: Path, tmp_path: Path
) -> None:
    """Table 1 needs C1 as wide as the encoder; here a neck would have to be trained."""
    chosen = with_settings(rows_of_table(PAPER_TABLES[1])[:2], {"hidden_dim": 32}, {})
    results = run_ablate(config(drawn_cache, tmp_path, rows=chosen, seeds=1), SilentReporter())
    assert [r.problem for r in results] == ["", ""]
    assert all(r.train_seconds == 0 and r.mean() is not None for r in results)


def test_rows_are_fitted_to_the_detector(drawn_cache: Path) -> None:
    spec = FeatureCache.open(drawn_cache).spec
    plans = plan_rows(rows_of_table(PAPER_TABLES[5]), spec)
    assert all("neck added: C1 has 16 channels, the encoder 32" in p.row.note for p in plans)
    assert all(p.cost is not None for p in plans)


def test_wrong_input_is_named(drawn_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--table 16 .fine-tuning trains the detector too"):
        paper_table(16)
    with pytest.raises(ConfigError, match="--seeds 0: give 1 or more"):
        run_ablate(config(drawn_cache, tmp_path, seeds=0), SilentReporter())
    (tmp_path / "rows/with-scoring/seed-0").mkdir(parents=True)
    (tmp_path / "rows/with-scoring/seed-0/result.json").write_text("{")
    results = run_ablate(config(drawn_cache, tmp_path, seeds=1), SilentReporter())
    assert "result.json is damaged" in results[0].problem
