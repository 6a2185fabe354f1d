from pathlib import Path
from typing import Any

import pytest
from mfdetr_pipelines.config.plan import PlanConfig
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.plan import disk_speed, run_plan

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import ConfigError, DetectorError
from mfdetr_cache.extraction.options import MapOptions, ViewOptions
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.recipes import build_recipe
from tests.support.ablations import SMALL
from tests.support.scenes import extract_config


def config(scenes_folder: Path, weights: Path, **changes: Any) -> PlanConfig:
    settings: dict[str, Any] = {
        "detector": "hf",
        "weights": str(weights),
        "annotations": scenes_folder / "instances.json",
        "recipe": build_recipe("fast", SMALL),
        "images": scenes_folder / "images",
        "sample": 8,
        "disk_seconds": 0.1,
        **changes,
    }
    return PlanConfig(**settings)


def test_a_plan_foretells_the_cache(
    scenes_folder: Path, rtdetr_folder: Path, tmp_path: Path
) -> None:
    """Bytes per preset against caches that are really extracted."""
    plan = run_plan(config(scenes_folder, rtdetr_folder, disk=tmp_path), SilentReporter())
    assert plan.images == 8
    assert list(tmp_path.iterdir()) == []
    sizes = {p.preset: p for p in plan.presets}
    for preset in ("fp16", "int8", "int4"):
        path = tmp_path / f"{preset}.zarr"
        settings = extract_config(scenes_folder, str(rtdetr_folder), path, preset=preset)
        run_extract(settings, SilentReporter())
        cache = FeatureCache.open(path)
        arrays = cache.stored_bytes_of_arrays()
        stored = sum(
            size for name, size in arrays.items() if "/hw" not in name and "offset" not in name
        )
        # The plan counts chunks without their padding to 64 tokens and without shard indexes.
        assert sizes[preset].total_bytes == pytest.approx(stored, rel=0.15)
    assert sizes["int4"].total_bytes < sizes["int8"].total_bytes < sizes["fp16"].total_bytes
    assert all(p.fits and p.extract_hours > 0 and p.cached_hours > 0 for p in plan.presets)


@pytest.mark.parametrize("c1", ["roi", "none"])
def test_a_plan_foretells_a_cache_without_the_whole_of_c1(
    scenes_folder: Path, rtdetr_folder: Path, tmp_path: Path, c1: str
) -> None:
    settings = config(
        scenes_folder, rtdetr_folder, disk=tmp_path, maps=MapOptions(c1=c1, roi_size=8)
    )
    plan = run_plan(settings, SilentReporter())
    path = tmp_path / "a.zarr"
    extraction = extract_config(
        scenes_folder, str(rtdetr_folder), path, preset="fp16", c1=c1, roi_size=8
    )
    run_extract(extraction, SilentReporter())
    arrays = FeatureCache.open(path).stored_bytes_of_arrays()
    stored = sum(s for n, s in arrays.items() if "/hw" not in n and "offset" not in n)
    fp16 = next(p for p in plan.presets if p.preset == "fp16")
    # Crops are counted by objects; a few objects share a query's crop or have none.
    assert fp16.total_bytes == pytest.approx(stored, rel=0.2)


def test_live_training_costs_the_detector_too(scenes_folder: Path, rtdetr_folder: Path) -> None:
    plan = run_plan(
        config(scenes_folder, rtdetr_folder, epochs=3.0, views=ViewOptions(2)), SilentReporter()
    )
    each = plan.detector_seconds + plan.head_seconds
    assert plan.live_hours == pytest.approx(3 * 8 * each / 3600)
    preset = plan.presets[0]
    assert preset.total_bytes == pytest.approx(3 * 8 * preset.bytes_per_image)
    if preset.pays_after is not None:
        saved = plan.live_hours - preset.cached_hours
        assert (preset.pays_after - 1) * saved < preset.extract_hours + 1e-12
        assert preset.pays_after * saved >= preset.extract_hours - 1e-12


def test_a_disk_is_left_as_it_was(tmp_path: Path) -> None:
    write, read = disk_speed(tmp_path, 0.05)
    assert write > 0
    assert read > 0
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_is_named(scenes_folder: Path, rtdetr_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--sample and --epochs must be above 0"):
        run_plan(config(scenes_folder, rtdetr_folder, sample=0), SilentReporter())
    with pytest.raises(DetectorError, match="does not exist"):
        run_plan(config(scenes_folder, Path("/nowhere")), SilentReporter())
