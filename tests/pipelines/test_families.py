"""Detectors of every kind go all the way, also those that lack something: levels, C1, a softmax."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.predict import PredictConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.predict import run_predict
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.reporter import SilentReporter
from tests.pipelines.test_train_head import small_recipe
from tests.support import detectors, scenes
from tests.support.small_checkpoints import write_small


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


@pytest.mark.parametrize("name", ["rt-detr", "rt-detr-v2-dsp", "deim", "deimv2", "rf-detr"])
def test_from_an_authors_checkpoint_to_masks(
    tmp_path: Path, scenes_folder: Path, name: str
) -> None:
    """Every layout of today's DETRs: extract, train, evaluate and predict from the file itself."""
    write_small(tmp_path / "best.pth", name)
    weights = str(tmp_path / "best.pth")
    config = scenes.extract_config(
        scenes_folder, weights, tmp_path / "a.zarr", detector=name, preset="int8", limit=4
    )
    assert run_extract(config, SilentReporter()).num_images == 4
    settings = TrainHeadConfig(
        tmp_path / "a.zarr", tmp_path / "head", small_recipe("fast", steps=2, min_match_iou=0)
    )
    assert run_train_head(settings, SilentReporter()).steps == 2
    found = run_evaluate(EvaluateConfig(tmp_path / "a.zarr", tmp_path / "head"), SilentReporter())
    assert 0 <= found.mask.AP <= 1
    photo = str(min((scenes_folder / "images").iterdir()))
    seen = PredictConfig((photo,), weights, tmp_path / "head", tmp_path / "out", name, 0.0, 3)
    assert [i.num_objects for i in run_predict(seen, SilentReporter()).images] == [3]
