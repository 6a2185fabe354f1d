"""Detectors that lack something go all the way: one level, a plain ViT without C1, a softmax."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.reporter import SilentReporter
from tests.pipelines.test_train_head import small_recipe
from tests.support import detectors, scenes


@pytest.mark.parametrize(
    "save", [detectors.save_detr, detectors.save_dab_detr, detectors.save_rf_detr]
)
def test_from_images_to_mask_ap(
    tmp_path: Path, scenes_folder: Path, save: Callable[[Path], None]
) -> None:
    save(tmp_path / "detector")
    config = scenes.extract_config(
        scenes_folder, str(tmp_path / "detector"), tmp_path / "a.zarr", preset="int8"
    )
    assert run_extract(config, SilentReporter()).num_images == 8
    labels = FeatureCache.open(tmp_path / "a.zarr").label_categories
    # "no object" and "other" belong to no category of the dataset.
    assert sum(c < 0 for c in labels) == len(labels) - 2
    for name in ("fast", "paper"):
        settings = TrainHeadConfig(
            tmp_path / "a.zarr", tmp_path / name, small_recipe(name, steps=2, min_match_iou=0)
        )
        assert run_train_head(settings, SilentReporter()).steps == 2
        found = run_evaluate(EvaluateConfig(tmp_path / "a.zarr", tmp_path / name), SilentReporter())
        assert 0 <= found.mask.AP <= 1
