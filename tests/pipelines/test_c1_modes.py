"""--c1 roi and none through extract, train-head and evaluate, on drawn images."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from mfdetr_pipelines.ablation.comparison import Comparison
from mfdetr_pipelines.ablation.rows import AblationRow
from mfdetr_pipelines.ablation.run import run_ablate
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.ablate import AblateConfig
from mfdetr_pipelines.config.cache import VerifyConfig
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.shared import LiveDetector
from mfdetr_pipelines.config.train_head import TrainHeadConfig, Validation
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import CacheError, ConfigError
from mfdetr_cache.head.build import build_head
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.config import Length
from mfdetr_cache.training.learner import loss_of_batch
from mfdetr_cache.training.loop import TrainingLoop
from mfdetr_cache.training.recipes import Recipe, asked_recipe, build_recipe
from tests.support.batches import batch_of
from tests.support.caches import files_of
from tests.support.scenes import extract_config


def recipe(**changes: str) -> Recipe:
    small = {"hidden_dim": "8", "roi_size": "8", "image_layers": "1", "box_layers": "1"}
    return build_recipe("paper", {**small, "points": "grid", **changes})


@pytest.fixture(scope="module")
def caches(
    tmp_path_factory: pytest.TempPathFactory, scenes_folder: Path, rtdetr_folder: Path
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("c1")
    made = {}
    for name, settings in {
        "full": {},
        "roi": {"c1": "roi", "roi_size": 8, "views": 1},
        "roi-16": {"c1": "roi", "roi_size": 16},
        "roi-int8": {"c1": "roi", "roi_size": 8, "preset": "int8"},
        "none": {"c1": "none"},
    }.items():
        made[name] = folder / f"{name}.zarr"
        config = extract_config(scenes_folder, str(rtdetr_folder), made[name], **settings)
        run_extract(config, SilentReporter())
    return made


def step(path: Path, chosen: Recipe) -> tuple[float, torch.Tensor]:
    cache = FeatureCache.open(path)
    torch.manual_seed(0)
    head = build_head(chosen.head, cache.spec)
    images = [cache.read(row, head.map_names) for row in cache.rows]
    losses = loss_of_batch(head, batch_of(images, head, chosen.train), chosen.train, 0)
    losses.total.backward()
    return losses.total.item(), torch.cat(
        [p.grad.flatten() for p in head.parameters() if p.grad is not None]
    )


def test_a_step_from_crops_is_a_step_from_the_map(caches: dict[str, Path]) -> None:
    """The crops are rounded to float16 after RoIAlign, the map before: 2^-11 of a value each.

    tests/head/test_c1_crops.py shows equality without rounding.
    """
    whole, whole_gradient = step(caches["full"], recipe())
    crops, gradient = step(caches["roi"], recipe())
    assert crops == pytest.approx(whole, rel=2e-3)
    gap = (gradient - whole_gradient).norm() / whole_gradient.norm()
    assert gap < 0.02
    coarse, _ = step(caches["roi-int8"], recipe())
    assert coarse == pytest.approx(whole, rel=2e-2)
    # A finer grid takes crops of its own size; the coarse one is their mean.
    finer = recipe(fine_size="16", coarse_weight="1")
    whole, whole_gradient = step(caches["full"], finer)
    crops, gradient = step(caches["roi-16"], finer)
    assert crops == pytest.approx(whole, rel=2e-3)
    assert (gradient - whole_gradient).norm() / whole_gradient.norm() < 0.02


def test_crops_are_smaller_and_stored_plainly(caches: dict[str, Path]) -> None:
    """Read with zarr and numpy alone, as docs/cache-format.md says."""
    sizes = {n: FeatureCache.open(p).stored_bytes_of_arrays() for n, p in caches.items()}
    assert sizes["roi"]["maps/c1_roi/values"] < sizes["full"]["maps/c1/values"]
    group: Any = zarr.open_group(str(caches["roi"]), mode="r")
    view = group["views/base"]
    cache = FeatureCache.open(caches["roi"])
    found = cache.read(2).c1_crops
    assert found is not None
    queries = view["c1_roi/query_index"][2]
    assert (queries[queries >= 0] == found.query_index).all()
    height, width = (int(v) for v in view["maps/c1_roi/hw"][2])
    assert (height, width) == (8 * len(found.query_index), 8)
    first = int(view["maps/c1_roi/offset"][2])
    cells = view["maps/c1_roi/values"][first : first + height * width]
    assert (cells.reshape(height, width, -1) == found.crops.to_array()).all()
    assert (view["c1_roi/moments"][2] == found.moments).all()
    assert tuple(view["c1_roi/c1_hw"][2]) == found.c1_hw
    # The last row is the mean of the map, which the other cache holds.
    c1 = FeatureCache.open(caches["full"]).read(2).maps["c1"].to_array()
    np.testing.assert_allclose(found.moments[-1], c1.astype(np.float64).mean((0, 1)), rtol=1e-3)


def test_training_runs_and_evaluation_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    config = TrainHeadConfig(caches["roi"], tmp_path / "run", recipe(), length=Length(2))
    assert run_train_head(config, SilentReporter()).steps == 2
    with pytest.raises(CacheError, match="extracted with --c1 roi.*cannot serve evaluation"):
        run_evaluate(EvaluateConfig(caches["roi"], tmp_path / "run"), SilentReporter())
    # The head is a head like any other.
    run_evaluate(
        EvaluateConfig(caches["full"], tmp_path / "run", extras=frozenset()), SilentReporter()
    )
    with pytest.raises(CacheError, match="cannot serve validation"):
        run_train_head(
            TrainHeadConfig(
                caches["full"],
                tmp_path / "two",
                recipe(),
                validation=Validation(caches["roi"]),
                length=Length(1),
            ),
            SilentReporter(),
        )


def test_an_ablation_does_not_train_what_it_cannot_measure(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingLoop, "run", lambda *_: pytest.fail("trained in vain"))
    rows = (AblationRow("one", recipe()),)
    for name in ("full", "roi"):
        settings = AblateConfig(
            Comparison("rows", rows),
            cache=(str(caches[name]),),
            val_cache=(str(caches["roi"]),),
            out=tmp_path / name,
        )
        (found,) = run_ablate(settings, SilentReporter())
        assert "extracted with --c1 roi" in found.problem
        assert "cannot serve evaluation" in found.problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match": "iou"}, "pass --set match=hungarian$"),
        ({"roi_size": "16", "box_jitter": "0.1"}, "--set box_jitter=0.0 --set roi_size=8$"),
        ({"roi_sampling_ratio": "2"}, "--set roi_sampling_ratio=0$"),
        ({"fine_size": "16"}, "pass --set fine_size=0$"),
    ],
)
def test_settings_that_crops_fix_are_named(
    caches: dict[str, Path], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    config = TrainHeadConfig(caches["roi"], tmp_path / "run", recipe(**changes), length=Length(1))
    with pytest.raises(ConfigError, match=message):
        run_train_head(config, SilentReporter())
    assert not (tmp_path / "run").exists()


def test_a_head_that_moves_boxes_needs_the_whole_map(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    chosen = build_recipe("istr_stages", {"hidden_dim": "16", "refinement_stages": "1"})
    config = TrainHeadConfig(caches["roi"], tmp_path / "run", chosen, length=Length(1))
    with pytest.raises(CacheError, match="cannot serve a head that moves boxes"):
        run_train_head(config, SilentReporter())
    assert not (tmp_path / "run").exists()


def test_without_c1_a_head_must_do_without(caches: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--c1 none: pass --set use_c1=false"):
        run_train_head(
            TrainHeadConfig(caches["none"], tmp_path / "a", recipe(), length=Length(1)),
            SilentReporter(),
        )
    chosen = recipe(use_c1="false")
    config = TrainHeadConfig(caches["none"], tmp_path / "b", chosen, length=Length(1))
    run_train_head(config, SilentReporter())
    run_evaluate(
        EvaluateConfig(caches["none"], tmp_path / "b", extras=frozenset()), SilentReporter()
    )


def test_verify_and_resume_know_crops(
    caches: dict[str, Path], scenes_folder: Path, rtdetr_folder: Path, tmp_path: Path
) -> None:
    source = LiveDetector(str(rtdetr_folder), scenes_folder / "images")
    found = run_verify(
        VerifyConfig(caches["roi"], full=True, live=4, detector=source), SilentReporter()
    )
    assert found.faults == ()
    copy = Path(shutil.copytree(caches["roi"], tmp_path / "copy.zarr"))
    next((copy / "views/base/status/manifest").glob("0*.json")).unlink()
    config = extract_config(scenes_folder, str(rtdetr_folder), copy, c1="roi", roi_size=8, views=1)
    run_extract(config, SilentReporter())
    assert files_of(copy) == files_of(caches["roi"])


@pytest.mark.parametrize("mode", ["full", "roi", "roi-16", "none"])
def test_auto_trains_on_what_there_is_of_c1(
    caches: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    asked = asked_recipe("auto", {"hidden_dim": "8", "image_layers": "1", "box_layers": "1"})
    config = TrainHeadConfig(str(caches[mode]), tmp_path / "run", asked, length=Length(2))
    assert run_train_head(config, SilentReporter()).steps == 2
