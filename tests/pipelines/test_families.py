"""Detectors of every kind go all the way, also those that lack something: levels, C1, a softmax."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.export import ExportConfig
from mfdetr_pipelines.config.predict import PredictConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.export import run_export
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.predict import run_predict
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.choices import Extra
from mfdetr_cache.coco.options import LabelOptions
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import HeadError
from mfdetr_cache.evaluation.detections import detected_queries, detections_of
from mfdetr_cache.evaluation.inference import predict_live
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.model import MaskFrozenDETR
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.regions import RegionSettings, build_regions
from mfdetr_cache.types import ABSENT_LOGIT
from tests.support import detectors, scenes, small_torchvision
from tests.support.small_checkpoints import write_small
from tests.support.training import small_recipe

EXTRAS: frozenset[Extra] = frozenset(("baselines", "oracles"))


@pytest.mark.parametrize(
    "save", [detectors.save_detr, detectors.save_dab_detr, detectors.save_rf_detr]
)
def test_from_images_to_mask_ap(
    tmp_path: Path, scenes_folder: Path, save: Callable[[Path], None]
) -> None:
    save(tmp_path / "detector")
    config = scenes.extract_config(
        scenes_folder, str(tmp_path / "detector"), tmp_path / "a.zarr", preset="int8", limit=4
    )
    extracted = run_extract(config, SilentReporter())
    assert extracted.num_images == 4
    labels = FeatureCache.open(tmp_path / "a.zarr").label_categories
    # "no object" and "other" belong to no category of the dataset.
    assert sum(c < 0 for c in labels) == len(labels) - 2
    for name in ("fast", "paper"):
        settings = TrainHeadConfig(
            tmp_path / "a.zarr", tmp_path / name, small_recipe(name, steps=2, min_match_iou=0)
        )
        assert run_train_head(settings, SilentReporter()).steps == 2
        found = run_evaluate(EvaluateConfig(tmp_path / "a.zarr", tmp_path / name), SilentReporter())
        assert found.box == extracted.box


@pytest.mark.parametrize(
    "name", ["rt-detr-ultralytics", "rt-detr-v2-dsp", "deim", "deimv2", "rf-detr"]
)
def test_from_an_authors_checkpoint_to_masks(
    tmp_path: Path, scenes_folder: Path, name: str
) -> None:
    """Every layout of today's DETRs: extract, train, evaluate and predict from the file itself."""
    write_small(tmp_path / "best.pth", name)
    weights = str(tmp_path / "best.pth")
    config = scenes.extract_config(
        scenes_folder, weights, tmp_path / "a.zarr", detector=name, preset="int8", limit=4
    )
    extracted = run_extract(config, SilentReporter())
    assert extracted.num_images == 4
    settings = TrainHeadConfig(
        tmp_path / "a.zarr", tmp_path / "head", small_recipe("fast", steps=2, min_match_iou=0)
    )
    assert run_train_head(settings, SilentReporter()).steps == 2
    found = run_evaluate(EvaluateConfig(tmp_path / "a.zarr", tmp_path / "head"), SilentReporter())
    assert found.box == extracted.box
    photo = str(min((scenes_folder / "images").iterdir()))
    seen = PredictConfig((photo,), weights, tmp_path / "head", tmp_path / "out", name, 0.0, 3)
    assert [i.num_objects for i in run_predict(seen, SilentReporter()).images] == [3]


@pytest.mark.parametrize(
    ("name", "recipe"), [("fasterrcnn_resnet50_fpn", "paper"), ("fcos_resnet50_fpn", "fast")]
)
def test_from_a_detector_without_queries_to_masks(
    tmp_path: Path,
    scenes_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    recipe: str,
) -> None:
    """Images of few detections and of none: the queries that are absent take no part."""
    weights, kind = str(tmp_path / "model.pth"), f"torchvision:{name}"
    small_torchvision.write_small(Path(weights), name, monkeypatch)
    config = scenes.extract_config(
        scenes_folder,
        weights,
        tmp_path / "a.zarr",
        detector=kind,
        preset="int8",
        options=DetectorOptions(labels=("ellipse", "box")),
    )
    extracted = run_extract(config, SilentReporter())
    assert extracted.num_images == 8
    cache = FeatureCache.open(tmp_path / "a.zarr")
    images = [cache.read(row, ()) for row in cache.rows]
    present = [(i.class_logits > ABSENT_LOGIT).any(1).sum() for i in images]
    assert min(present) < 10
    assert max(present) < cache.spec.num_queries
    assert all(len(detections_of(i, cache.spec)) == n for i, n in zip(images, present, strict=True))
    chosen = small_recipe(recipe, steps=2, query_o2o="true", match="hungarian")
    settings = TrainHeadConfig(tmp_path / "a.zarr", tmp_path / "head", chosen)
    assert run_train_head(settings, SilentReporter()).steps == 2
    regions = RegionSettings.of(chosen.train, chosen.head)
    for image, count in zip(images, present, strict=True):
        found = build_regions(image, regions, np.random.default_rng(0))
        assert (found.query_index < count).all()
        assert len(found) == min(count, 2)
        assert len(detected_queries(image, cache.spec)) == count
    measure = EvaluateConfig(tmp_path / "a.zarr", tmp_path / "head", extras=EXTRAS)
    assert run_evaluate(measure, SilentReporter()).box == extracted.box
    photo = sorted(map(str, (scenes_folder / "images").iterdir()))[0]
    seen = PredictConfig((photo,), weights, tmp_path / "head", tmp_path / "out", kind, 0.0, 3)
    assert run_predict(seen, SilentReporter()).images[0].num_objects == min(present[0], 3)


def test_an_exported_graph_finds_as_many_as_there_are(
    tmp_path: Path, scenes_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced with noise, run on pictures with other numbers of detections."""
    weights = tmp_path / "model.pth"
    small_torchvision.write_small(weights, "fcos_resnet50_fpn", monkeypatch)
    config = scenes.extract_config(scenes_folder, str(weights), tmp_path / "a.zarr", limit=4)
    run_extract(config, SilentReporter())
    settings = TrainHeadConfig(tmp_path / "a.zarr", tmp_path / "head", small_recipe(steps=2))
    run_train_head(settings, SilentReporter())
    asked = ExportConfig(
        tmp_path / "head",
        tmp_path / "model.onnx",
        input_hw=(96, 128),
        weights=str(weights),
        top_k=10,
    )
    run_export(asked, SilentReporter())
    session = onnxruntime.InferenceSession(str(asked.out), providers=["CPUExecutionProvider"])
    detector = load_detector("auto", str(weights))
    counts = []
    for seed in range(3):
        noise = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(seed))
        pixels = torch.nn.functional.interpolate(noise, size=(96, 128), mode="bicubic")
        wanted = detector.forward(pixels).class_logits[0].sigmoid().amax(-1)[:10]
        scores = session.run(None, {"pixel_values": pixels.numpy()})[0].max(1)
        np.testing.assert_allclose(scores, wanted, atol=1e-4)
        counts.append(int((wanted > 0).sum()))
    assert len(set(counts)) > 1


def test_any_word_with_a_head_that_has_no_classes(tmp_path: Path, scenes_folder: Path) -> None:
    """The dataset's names are the prompt of the cache; later words are others."""
    folder, cache, head = (tmp_path / name for name in ("detector", "a.zarr", "head"))
    detectors.save_grounding_dino(folder)
    agnostic = LabelOptions(class_agnostic=True)
    config = scenes.extract_config(scenes_folder, str(folder), cache, limit=4, labels=agnostic)
    run_extract(config, SilentReporter())
    spec = FeatureCache.open(cache).root.spec
    assert spec.settings["prompt"] == ["ellipse", "box", "crowd"]
    recipe = small_recipe("paper", steps=2, min_match_iou=0, mask_scoring="true")
    run_train_head(TrainHeadConfig(cache, head, recipe), SilentReporter())
    photo = str(min((scenes_folder / "images").iterdir()))
    words = ("elephant", "tiger", "light")
    seen = PredictConfig((photo,), str(folder), head, tmp_path / "out", "hf", 0.0, 100, words)
    assert run_predict(seen, SilentReporter()).images[0].num_objects > 10
    found = MaskFrozenDETR.from_pretrained(folder, head, device="cpu", prompt=words)(photo, 0.0)
    assert set(found.names) <= set(words)
    assert {words[i - 1] for i in found.category_ids} == set(found.names)
    # Masks and their scores are those of the prompted detector's own queries and maps.
    detector = load_detector("hf", str(folder), DetectorOptions(prompt=words))
    picture = load_image(Path(photo))
    output = detector.forward(detector.preprocess(picture)[None])
    geometry = detector.input_geometry((picture.height, picture.width))
    wanted = predict_live(load_head(head).head.eval(), output, geometry, detector.spec)
    assert found.scores.max() == pytest.approx(wanted.confidences.max(), abs=1e-6)
    with_classes = scenes.extract_config(scenes_folder, str(folder), tmp_path / "b.zarr", limit=4)
    extracted = run_extract(with_classes, SilentReporter())
    settings = TrainHeadConfig(tmp_path / "b.zarr", tmp_path / "b", recipe)
    run_train_head(settings, SilentReporter())
    measure = EvaluateConfig(tmp_path / "b.zarr", tmp_path / "b")
    assert run_evaluate(measure, SilentReporter()).box == extracted.box
    with pytest.raises(HeadError, match="one that was trained with --class-agnostic takes any"):
        MaskFrozenDETR.from_pretrained(folder, tmp_path / "b", device="cpu", prompt=words)
