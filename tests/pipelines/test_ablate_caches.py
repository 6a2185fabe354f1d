"""Rows that have caches of their own, or the detector: Tables 11, 14 and 16 on drawn scenes."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mfdetr_pipelines.ablation.caches import Choices, find_caches, open_caches
from mfdetr_pipelines.ablation.comparison import PAPER_TABLES, Comparison
from mfdetr_pipelines.ablation.report import write_report
from mfdetr_pipelines.ablation.rows import (
    AblationRow,
    rows_of_file,
    varied_rows,
    with_settings,
)
from mfdetr_pipelines.ablation.run import run_ablate
from mfdetr_pipelines.ablation.samples import sample_masks
from mfdetr_pipelines.config.ablate import AblateConfig, RowExtraction
from mfdetr_pipelines.extract import run_extract

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.extraction.options import ViewOptions
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.reporter import SilentReporter
from tests.pipelines.test_ablation_rows import ONE_CACHE
from tests.support.ablations import config as ablation
from tests.support.detectors import save_deformable_detr
from tests.support.scenes import extract_config, write_scenes


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scenes, a detector of five encoder layers, and caches of its fourth with a view."""
    folder = tmp_path_factory.mktemp("given")
    write_scenes(folder, count=4, seed=3)
    save_deformable_detr(folder / "detector", two_stage=True)
    for name, views in (("train", 1), ("val", 0)):
        settings = extract_config(
            folder, str(folder / "detector"), folder / f"{name}.zarr", views=views
        )
        run_extract(settings, SilentReporter())
    return folder


def config(
    given: Path, out: Path, rows: Sequence[AblationRow], *, extract: bool = True, **changes: Any
) -> AblateConfig:
    """A step of every row, with a small head."""
    small = {"hidden_dim": 16, "roi_size": 8, "image_layers": 1, "box_layers": 1}
    extraction = RowExtraction()
    if extract:
        annotations = given / "instances.json"
        extraction = RowExtraction(
            extract=True,
            weights=str(given / "detector"),
            train_images=given / "images",
            train_annotations=annotations,
            val_annotations=annotations,
        )
    settings: dict[str, Any] = {
        "cache": (str(given / "train.zarr"),),
        "val_cache": (str(given / "val.zarr"),),
        "images": given / "images",
        "max_steps": 1,
        "device": "cpu",
        **changes,
    }
    compared = Comparison("rows", with_settings(rows, small, {"batch_size": 2}))
    return AblateConfig(compared, out=out, extraction=extraction, **settings)


def table(number: int) -> tuple[AblationRow, ...]:
    return PAPER_TABLES[number].rows


def test_every_table_is_walked() -> None:
    """Here, in test_ablation_rows.py, or, for COCO's server, in test_evaluate.py."""
    assert {*ONE_CACHE, 8, 11, 14, 16} == set(range(1, 17)) == set(PAPER_TABLES)


def test_an_encoder_layer_is_a_row_with_caches_of_its_own(given: Path, tmp_path: Path) -> None:
    """Layer 2 is extracted, layer 4 is what was given, and of five layers none is the sixth."""
    settings = config(given, tmp_path, table(14))
    reporter = SilentReporter()
    results = run_ablate(settings, reporter)
    assert [r.problem == "" for r in results] == [True, True, False]
    assert "--encoder-layer 6" in results[2].problem
    assert results[1].against_first is not None
    said = [m for m in reporter.messages if "caches to extract, about" in m]
    assert len(said) == 1
    found = find_caches(settings).by_row
    second, fourth = found["encoder layer 2"], found["encoder layer 4"]
    assert fourth.training.path == str(given / "train.zarr")
    for cache, like in ((second.training, fourth.training), (second.validation, fourth.validation)):
        assert cache.spec.settings["encoder_layer"] == 2
        choices = Choices.of(cache)
        assert choices == Choices.of(like).changed({"encoder_layer": 2})
        assert cache.identity["images"] == like.identity["images"]
    assert second.training.layout.views == ("base", "deformable-detr-0")
    # A training of each: they saw other features.
    heads = [
        load_head(tmp_path / "rows" / f"encoder-layer-{n}" / "seed-0").detector for n in (2, 4)
    ]
    assert [h["settings"]["encoder_layer"] for h in heads] == [2, 4]
    samples = sample_masks(found, results, tmp_path, given / "images", count=1)
    assert [p.title for p in samples[0].panels] == [
        "annotation", "encoder layer 2", "encoder layer 4"
    ]  # fmt: skip
    # What was extracted is found again, without --extract, and also when it is given.
    kept = config(given, tmp_path, table(14), extract=False)
    again = run_ablate(kept, SilentReporter())
    assert [r.seeds for r in again[:2]] == [r.seeds for r in results[:2]]
    assert "no given cache is as it asks; --extract would make" in again[2].problem
    both = config(
        given,
        tmp_path / "given",
        table(14)[:2],
        extract=False,
        cache=(str(given / "train.zarr"), second.training.path),
        val_cache=(str(given / "val.zarr"), second.validation.path),
    )
    assert {n: c.training.cache_id for n, c in find_caches(both).by_row.items()} == {
        n: c.training.cache_id for n, c in found.items()
    }
    # A row asks for a cache also where the other one of its two is missing.
    half = replace(both, val_cache=both.val_cache[:1])
    assert list(find_caches(half).missing) == ["encoder layer 2"]


def test_jittering_is_a_row_with_views_of_its_own(given: Path, tmp_path: Path) -> None:
    settings = config(given, tmp_path, table(11))
    results = run_ablate(settings, SilentReporter())
    assert [r.problem for r in results] == ["", ""]
    found = list(find_caches(settings).by_row.values())
    assert [c.training.layout.views[1:] for c in found] == [
        ("deformable-detr-0",), ("large-scale-jitter-0",)
    ]  # fmt: skip
    assert found[0].validation.path == found[1].validation.path
    # Where nothing has views, both rows get as many as the paper has epochs.
    plain = config(given, tmp_path / "b", table(11), cache=(str(given / "val.zarr"),))
    missing = find_caches(plain).missing
    wanted = [m.choices.views for caches in missing.values() for m in caches]
    assert wanted == [ViewOptions(5, "deformable-detr"), ViewOptions(5, "large-scale-jitter")]
    (cache, *_) = missing["large-scale jittering"]
    assert cache.num_bytes == 6 * FeatureCache.open(given / "val.zarr").stored_bytes


def test_a_tuned_detector_is_a_row_measured_through_itself(given: Path, tmp_path: Path) -> None:
    settings = config(given, tmp_path, table(16), detector_hours=1.0)
    results = run_ablate(settings, SilentReporter())
    assert [r.problem for r in results] == ["", "", ""]
    given_weights = FeatureCache.open(given / "val.zarr").spec.weights_sha256
    names = ("frozen", "encoder-and-decoder-tuned", "all-of-it-tuned")
    folders = [tmp_path / "rows" / name / "seed-0" for name in names]
    assert not (folders[0] / "val.zarr").exists()
    for folder in folders[1:]:
        own = FeatureCache.open(folder / "val.zarr").spec.weights_sha256
        assert own == load_head(folder).detector["weights_sha256"] != given_weights
    tuned = [load_head(f).run.joint["augment"] for f in folders]  # type: ignore[index]
    assert tuned == ["deformable-detr"] * 3
    assert all(r.train_seconds > 0 and r.against_first is not None for r in results[1:])
    again = run_ablate(settings, SilentReporter())
    assert [r.seeds for r in again] == [r.seeds for r in results]
    write_report(tmp_path, "16", results, published=PAPER_TABLES[16].published)
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert len(document["published"]) == 11
    without = run_ablate(
        config(given, tmp_path / "b", table(16)[:1], extract=False), SilentReporter()
    )
    assert "it runs the detector: give --extract with --weights" in without[0].problem


def test_rows_of_a_file_name_their_caches(given: Path, tmp_path: Path) -> None:
    path, train, val = tmp_path / "rows.toml", given / "train.zarr", given / "val.zarr"
    path.write_text(
        '[[row]]\nname = "with views"\n'
        f'[[row]]\nname = "without"\ncache = "{val}"\n'
        f'[[row]]\nname = "absent"\ncache = "{given / "no.zarr"}"\n'
        '[[row]]\nname = "layer 2"\nextract = { encoder_layer = 2 }\n'
    )
    settings = config(given, tmp_path / "out", rows_of_file(path), extract=False)
    results = run_ablate(settings, SilentReporter())
    assert [r.problem[:30] for r in results] == [
        "", "", f"cache {given}/no.zarr"[:30], "no given cache is as it asks; "
    ]  # fmt: skip
    found = find_caches(settings).by_row
    assert [c.training.path for c in found.values()] == [str(train), str(val)]


def test_what_cannot_be_asked_for_is_named(given: Path, tmp_path: Path) -> None:
    row = table(14)[0]
    for changes, message in (
        ({"cache": ()}, "give --cache to train from, or --dry-run"),
        ({"cache": (str(given / "train.zarr"), str(given / "val.zarr"))}, "no row asks for it"),
    ):
        chosen = {"rows": [replace(row, extract={})], "extract": False, **changes}
        with pytest.raises(ConfigError, match=message):
            run_ablate(config(given, tmp_path, **chosen), SilentReporter())  # type: ignore[arg-type]
    settings = config(given, tmp_path, [row])
    lacking = replace(settings, extraction=replace(settings.extraction, weights=None))
    with pytest.raises(ConfigError, match="takes --weights, --train-images and --train-annot"):
        run_ablate(lacking, SilentReporter())


def test_a_setting_is_varied_over_views(given: Path, tmp_path: Path) -> None:
    base = AblationRow("a", table(14)[0].recipe)
    made = varied_rows([base], {"views": "1,2,3", "roi_size": "8,16"})
    assert [r.name for r in made][:2] == ["a, views=1, roi_size=8", "a, views=1, roi_size=16"]
    assert [(r.recipe.train.views, r.recipe.head.roi_size) for r in made[2:4]] == [
        ("2", 8), ("2", 16)
    ]  # fmt: skip
    results = run_ablate(
        config(given, tmp_path, varied_rows([base], {"views": "1,2,3"}), extract=False),
        SilentReporter(),
    )
    assert [r.problem for r in results] == [
        "", "", "views=3: the cache has 2; extract one with --views 2"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--vary: unknown setting 'vieuws'"):
        varied_rows([base], {"vieuws": "1"})
    with pytest.raises(ConfigError, match="--vary: views must be all, base or a number"):
        varied_rows([base], {"views": "0"})


def test_images_that_rows_learn_from_are_told_once(drawn_cache: Path, tmp_path: Path) -> None:
    reporter = SilentReporter()
    open_caches(ablation(drawn_cache, tmp_path), reporter)
    assert [m for m in reporter.messages if "this is no validation" in m] == reporter.messages
    assert len(reporter.messages) == 1
