"""The real COCO-trained detector on real images, against what its original ONNX export gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.evaluation.coco_metrics import evaluate_results
from mfdetr_cache.evaluation.detections import detections_of, select_detections
from mfdetr_cache.evaluation.results import box_results
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.recipes import build_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def detector(shared: Path) -> Detector:
    return load_detector("hf", str(shared / "detectors/deimv2-femto-coco"))


@pytest.fixture(scope="module")
def val_cache(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("real") / "val2017.zarr"
    config = ExtractConfig(
        str(shared / "detectors/deimv2-femto-coco"),
        cache,
        images=shared / "coco-mini/val2017",
        annotations=shared / "coco-mini/annotations/instances_val2017.json",
    )
    reporter = SilentReporter()
    summary = run_extract(config, reporter)
    assert not any("implausibly" in m for m in reporter.messages)
    # The published model on these images; 3.5 is what the uncorrected class gives.
    assert pytest.approx(0.336, abs=0.0005) == summary.box.AP
    return cache


def test_detections_are_those_of_the_original(shared: Path, detector: Detector) -> None:
    expected = np.load(shared / "detectors/deimv2-femto-coco-expected.npz")
    split = load_coco_split(shared / "coco-mini/annotations/instances_val2017.json")
    entries = [e for e in split.images if f"{e.image_id}_scores" in expected]
    assert len(entries) == 20
    for entry in entries:
        image = load_image(shared / "coco-mini/val2017" / entry.file_name, entry.size_hw)
        output = detector.forward(detector.preprocess(image)[None])
        found = select_detections(
            output.class_logits[0], output.boxes_cxcywh_norm[0], entry.size_hw, detector.spec, 300
        )
        scores = expected[f"{entry.image_id}_scores"]
        confident = int((scores > 0.3).sum())
        np.testing.assert_allclose(found.class_scores[:confident], scores[:confident], atol=1e-3)
        assert (
            found.labels[:confident].numpy() == expected[f"{entry.image_id}_labels"][:confident]
        ).all()
        np.testing.assert_allclose(
            found.boxes_xyxy[:confident],
            expected[f"{entry.image_id}_boxes_xyxy"][:confident],
            atol=0.5,
        )


def test_the_corrections_leave_a_right_model_as_it_is(detector: Detector) -> None:
    """Applied twice they change nothing, so a transformers that is mended one day stays right."""
    from mfdetr_cache.detectors.huggingface.deimv2 import restore_original_deimv2

    pixels = torch.rand(1, 3, 416, 416)
    once = detector.forward(pixels).class_logits
    restore_original_deimv2(detector.model)  # type: ignore[attr-defined]
    assert torch.equal(detector.forward(pixels).class_logits, once)


def test_cached_box_ap_is_the_live_models(
    shared: Path, detector: Detector, val_cache: Path
) -> None:
    """The live model on every fourth image, scored against the user's own JSON."""
    from pycocotools.coco import COCO

    path = shared / "coco-mini/annotations/instances_val2017.json"
    split = load_coco_split(path)
    cache = FeatureCache.open(val_cache)
    live, stored = [], []
    for row, entry in list(enumerate(split.images))[::4]:
        image = load_image(shared / "coco-mini/val2017" / entry.file_name, entry.size_hw)
        output = detector.forward(detector.preprocess(image)[None])
        found = select_detections(
            output.class_logits[0], output.boxes_cxcywh_norm[0], entry.size_hw, detector.spec
        )
        live += box_results(entry.image_id, found, cache.label_categories)
        cached = cache.read(row, ())
        stored += box_results(
            cached.image_id, detections_of(cached, cache.spec), cache.label_categories
        )
    truth = COCO(str(path))
    live_ap = evaluate_results(truth, live, "bbox").AP
    assert pytest.approx(live_ap, abs=0.0005) == evaluate_results(truth, stored, "bbox").AP


def test_ground_truth_in_the_cache_is_the_json(shared: Path, val_cache: Path) -> None:
    cache = FeatureCache.open(val_cache)
    document = json.loads((shared / "coco-mini/annotations/instances_val2017.json").read_text())
    by_id = {a["id"]: a for a in document["annotations"]}
    total = 0
    for row in cache.rows:
        truth = cache.ground_truth(row)
        total += len(truth)
        for index, number in enumerate(truth.annotation_ids):
            annotation = by_id.pop(int(number))
            assert annotation["area"] == truth.areas[index]
            assert annotation["iscrowd"] == truth.is_crowd[index]
            assert cache.label_categories[truth.labels[index]] == annotation["category_id"]
    assert total == len(document["annotations"])
    assert not by_id


def test_a_head_learns_and_every_oracle_is_an_upper_bound(val_cache: Path, tmp_path: Path) -> None:
    """On the very images it learned from; a short training of a small head.

    Mask AP is 11.3 for the box as mask, 46.2 for the annotated mask clipped to the box.
    """
    small = {"roi_size": "8", "hidden_dim": "16", "image_layers": "0", "steps": "60"}
    small |= {"fine_size": "0", "roi_sampling_ratio": "2", "num_points": "256"}
    run_train_head(
        TrainHeadConfig(val_cache, tmp_path / "run", build_recipe("fast", small)), SilentReporter()
    )
    config = EvaluateConfig(val_cache, tmp_path / "run", extras=frozenset({"baselines", "oracles"}))
    summary = run_evaluate(config, SilentReporter())
    assert summary.floor is not None
    assert summary.ceiling is not None
    assert pytest.approx(0.113, abs=0.0005) == summary.floor.AP
    assert pytest.approx(0.462, abs=0.0005) == summary.ceiling.AP
    assert summary.mask.AP50 > summary.floor.AP50
    for name, metrics in summary.oracles.items():
        assert metrics.AP50 > summary.mask.AP50, name
