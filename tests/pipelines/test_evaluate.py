import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfdetr_pipelines import evaluate
from mfdetr_pipelines.config.evaluate import EvaluateConfig, TimedDetector
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.evaluate_results import run_evaluate_results
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import decode
from scipy.ndimage import binary_erosion, map_coordinates

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.protocol import MaskingDetector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import CacheError, DatasetError, HeadError, OutputError
from mfdetr_cache.evaluation.baselines import box_masks, oracle_masks
from mfdetr_cache.evaluation.coco_metrics import (
    coco_ground_truth,
    evaluate_results,
    measure_results,
)
from mfdetr_cache.evaluation.detections import detections_of
from mfdetr_cache.evaluation.measure import Latency, ground_truth_of
from mfdetr_cache.evaluation.oracles import ORACLES
from mfdetr_cache.evaluation.results import box_results, mask_results
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.ops.masks import compress_run_lengths, decode_run_lengths, encode_mask
from mfdetr_cache.reporter import SilentReporter
from tests.support.scenes import extract_config
from tests.support.small_checkpoints import write_small
from tests.support.training import small_recipe


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, drawn_cache: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "head"
    run_train_head(TrainHeadConfig(drawn_cache, out, small_recipe()), SilentReporter())
    return out


def test_metrics_are_pycocotools_own(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, head: Path
) -> None:
    """The written results, scored by pycocotools against the user's own JSON, give our numbers."""
    results = tmp_path / "results.json"
    summary = run_evaluate(
        EvaluateConfig(drawn_cache, head, save_results=results), SilentReporter()
    )
    referee = run_evaluate(
        EvaluateConfig(drawn_cache, head, evaluator="pycocotools"), SilentReporter()
    )
    assert {k: v for k, v in summary.metrics().items() if v is not None} == {
        k: pytest.approx(v, abs=1e-12) for k, v in referee.metrics().items() if v is not None
    }
    for name in ("mask", "box"):
        ours, theirs = summary.details[name], referee.details[name]
        assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-12)
        for our, their in zip(ours["categories"], theirs["categories"], strict=True):
            assert our == {
                k: v if isinstance(v, str) else pytest.approx(v, abs=1e-12)
                for k, v in their.items()
            }
        # COCO's AP is the mean over categories that have objects.
        aps = [c["AP"] for c in ours["categories"] if c["objects"]]
        assert np.mean(aps) == pytest.approx(summary.metrics()[name]["AP"], abs=1e-12)  # type: ignore[index]
    truth = COCO(str(scenes_folder / "instances.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(results)), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert list(summary.mask.to_dict().values()) == pytest.approx(
        list(evaluation.stats[:6]), abs=1e-12
    )
    first = json.loads(results.read_text())[0]
    assert set(first) == {"image_id", "category_id", "segmentation", "score"}


def test_perfect_results_have_an_ap_of_one(drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    results = []
    for row in cache.rows:
        truth, size = cache.ground_truth(row), cache.geometry(row).original_hw
        for index in range(len(truth)):
            x0, y0, x1, y1 = (float(v) for v in truth.boxes_xyxy[index])
            results.append(
                {
                    "image_id": cache.image_id(row),
                    "category_id": int(truth.category_ids[index]),
                    "score": 0.9,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": compress_run_lengths(truth.run_lengths[index], size),
                }
            )
    coco = coco_ground_truth(
        (
            (cache.image_id(r), cache.geometry(r).original_hw, cache.ground_truth(r))
            for r in cache.rows
        ),
        cache.categories,
    )
    assert pytest.approx(1) == evaluate_results(coco, results, "segm").AP
    assert pytest.approx(1) == evaluate_results(coco, results, "bbox").AP
    assert evaluate_results(coco, [], "segm").AP == 0


def test_oracle_is_at_least_the_box_where_both_hit(drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    image = cache[0]
    detections, size = detections_of(image, cache.spec), image.geometry.original_hw
    floor = box_masks(detections, size)
    ceiling = oracle_masks(detections, image.ground_truth, cache.label_categories, size)
    assert len(floor) == len(ceiling) == len(detections)
    scores = detections.class_scores.double().numpy()
    listed = mask_results(1, detections, cache.label_categories, floor, scores)
    # The detector's third label has no category in this dataset.
    known = sum(cache.label_categories[int(v)] >= 0 for v in detections.labels)
    assert 0 < len(listed) == len(box_results(1, detections, cache.label_categories)) == known
    assert known < len(detections)
    assert np.all(np.diff(scores) <= 0)


def test_wrong_input_is_one_clear_line(tmp_path: Path, drawn_cache: Path, head: Path) -> None:
    with pytest.raises(CacheError, match="does not exist; make it with: mfdetr extract"):
        run_evaluate(EvaluateConfig(tmp_path / "absent", head), SilentReporter())
    with pytest.raises(HeadError, match="is no trained head"):
        run_evaluate(EvaluateConfig(drawn_cache, tmp_path), SilentReporter())
    torn = tmp_path / "torn.zarr"
    shutil.copytree(drawn_cache, torn)
    next(torn.glob("views/base/status/manifest/0*.json")).unlink()
    with pytest.raises(CacheError, match="is not finished: 1 of 1 parts are missing; run the same"):
        run_evaluate(EvaluateConfig(torn, head), SilentReporter())


def test_the_final_score_can_be_chosen(drawn_cache: Path, tmp_path: Path, head: Path) -> None:
    """Eq. 13, Eq. 2 and the class score alone order the same masks differently."""
    with pytest.raises(HeadError, match="predicts no mask IoU; score by mean or class"):
        run_evaluate(EvaluateConfig(drawn_cache, head, scoring="iou"), SilentReporter())
    head = tmp_path / "scored"
    recipe = small_recipe(mask_scoring="true")
    run_train_head(TrainHeadConfig(drawn_cache, head, recipe), SilentReporter())
    results = {}
    for scoring in ("auto", "iou", "mean", "class"):
        path = tmp_path / f"{scoring}.json"
        config = EvaluateConfig(
            drawn_cache, head, extras=frozenset(), save_results=path, scoring=scoring
        )
        run_evaluate(config, SilentReporter())
        results[scoring] = json.loads(path.read_text())
    assert results["auto"] == results["iou"]
    scores = {s: [r["score"] for r in found] for s, found in results.items()}
    assert scores["iou"] != scores["mean"] != scores["class"]
    assert all(m <= c for m, c in zip(scores["mean"], scores["class"], strict=True))
    masks = [[r["segmentation"] for r in found] for found in results.values()]
    assert masks[0] == masks[1] == masks[2] == masks[3]


def test_a_results_file_is_measured_as_the_run_that_wrote_it(
    drawn_cache: Path, scenes_folder: Path, tmp_path: Path, head: Path
) -> None:
    path = tmp_path / "results.json"
    wanted = run_evaluate(
        EvaluateConfig(drawn_cache, head, extras=frozenset(), save_results=path), SilentReporter()
    )
    found = run_evaluate_results(path, scenes_folder / "instances.json")
    assert found.metrics()["mask"] == wanted.mask.to_dict()
    assert found.metrics()["box"] is None
    assert found.num_results == len(json.loads(path.read_text())) > 0


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is not JSON"),
        ('[{"image_id": 1}]', "result 0 has no id 'category_id'"),
        ('[{"image_id": 1, "category_id": 3, "score": 0.5}]', "result 0 is of image 1, which is"),
        (
            '[{"image_id": 100, "category_id": 3, "score": 0.5}]',
            "result 0 has neither bbox nor segmentation",
        ),
    ],
)
def test_results_that_cannot_be_measured_are_named(
    scenes_folder: Path, tmp_path: Path, document: str, message: str
) -> None:
    (tmp_path / "r.json").write_text(document)
    with pytest.raises(DatasetError, match=message):
        run_evaluate_results(tmp_path / "r.json", scenes_folder / "instances.json")


class BoundaryEval(COCOeval):
    """Boundary AP from its definition, with scipy's erosion and COCOeval's matching."""

    def computeIoU(self, image_id: int, category_id: int) -> Any:
        plain = super().computeIoU(image_id, category_id)
        if not len(plain):
            return plain
        truth = self._gts[image_id, category_id]
        found = sorted(self._dts[image_id, category_id], key=lambda d: -d["score"])[:100]
        for i, detection in enumerate(found):
            for j, target in enumerate(truth):
                if target["iscrowd"]:
                    continue
                a, b = (
                    self.boundary(coco, r)
                    for coco, r in ((self.cocoDt, detection), (self.cocoGt, target))
                )
                union = (a | b).sum()
                plain[i, j] = min(plain[i, j], (a & b).sum() / union if union else 0.0)
        return plain

    @staticmethod
    def boundary(coco: Any, annotation: Any) -> Any:
        mask = coco.annToMask(annotation).astype(bool)
        width = max(1, round(0.02 * float(np.hypot(*mask.shape))))
        padded = np.pad(mask, 1)
        inner = binary_erosion(padded, np.ones((3, 3), bool), iterations=width)
        return mask & ~inner[1:-1, 1:-1]


def test_boundary_ap_is_what_its_definition_gives(drawn_cache: Path, tmp_path: Path) -> None:
    """Annotated masks moved by up to a pixel: their boundaries overlap by anything from 0 to 1."""
    cache = FeatureCache.open(drawn_cache)
    truth = ground_truth_of(cache)
    random = np.random.default_rng(0)
    results = []
    for row in cache.rows:
        size = cache.geometry(row).original_hw
        objects = cache.ground_truth(row)
        for index in range(len(objects)):
            mask = decode_run_lengths(objects.run_lengths[index], size)
            moved = np.roll(mask, tuple(random.integers(-1, 2, 2)), (0, 1))
            results.append(
                {
                    "image_id": cache.image_id(row),
                    "category_id": int(objects.category_ids[index]),
                    "segmentation": encode_mask(moved),
                    "score": float(random.random()),
                }
            )
    found = evaluate_results(truth, results, "boundary")
    independent = BoundaryEval(truth, truth.loadRes([dict(r) for r in results]), "segm")
    independent.evaluate()
    independent.accumulate()
    independent.summarize()
    assert 0.05 < found.AP < 0.95
    assert list(found.to_dict().values()) == pytest.approx(list(independent.stats[:6]), abs=1e-9)
    assert found.AP < evaluate_results(truth, results, "segm").AP


def test_what_would_be_if_one_thing_were_perfect(drawn_cache: Path, head: Path) -> None:
    config = EvaluateConfig(drawn_cache, head, extras=frozenset({"baselines"}), scoring="class")
    assert run_evaluate(config, SilentReporter()).oracles == {}
    summary = run_evaluate(replace(config, extras=config.extras | {"oracles"}), SilentReporter())
    assert set(summary.oracles) == set(ORACLES)
    # Scored by class alone, the oracle's masks are the ceiling.
    assert summary.oracles["masks"] == summary.ceiling
    # This detector has learned nothing: objects that are missed are most of what is lost.
    assert max(0.5, summary.mask.AP) < summary.oracles["found"].AP


def test_a_detectors_own_masks_are_measured_too(
    tmp_path: Path, scenes_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RF-DETR's: resampled to the image by SciPy here, and cut at 0."""
    weights, cache = tmp_path / "seg.pth", tmp_path / "c.zarr"
    write_small(weights, "rf-detr")
    run_extract(extract_config(scenes_folder, str(weights), cache, limit=2), SilentReporter())
    run_train_head(TrainHeadConfig(cache, tmp_path / "head", small_recipe()), SilentReporter())
    measured: list[Any] = []

    def keep(truth: COCO, results: Any, *others: Any) -> Any:
        measured.extend(results)
        return measure_results(truth, results, *others)

    monkeypatch.setattr(evaluate, "measure_results", keep)
    live = TimedDetector(str(weights), scenes_folder / "images")
    config = EvaluateConfig(cache, tmp_path / "head", extras=frozenset(), live=live)
    summary = run_evaluate(config, SilentReporter())
    assert summary.own is not None
    assert summary.metrics()["own"] == summary.own.to_dict()
    opened, detector = FeatureCache.open(cache), load_detector("rf-detr", str(weights))
    assert isinstance(detector, MaskingDetector)
    image = opened.read(0, ())
    detections = detections_of(image, opened.spec)
    height, width = image.geometry.original_hw
    picture = Image.open(scenes_folder / "images" / image.file_name).convert("RGB")
    pixels = detector.preprocess(picture)[None]
    masks = detector.own_masks(detector.forward(pixels), (192, 192))[0].numpy()
    places = np.meshgrid(
        (np.arange(height) + 0.5) * 48 / height - 0.5,
        (np.arange(width) + 0.5) * 48 / width - 0.5,
        indexing="ij",
    )
    ours = [r for r in measured if r["image_id"] == image.image_id]
    categories = np.array(opened.label_categories)[detections.labels.numpy()]
    queries = detections.query_index.numpy()[categories >= 0]
    assert len(queries) > 10
    for result, query in zip(ours, queries, strict=True):
        logits = map_coordinates(masks[query], places, order=1, mode="nearest")
        found = decode(result["segmentation"]).astype(bool)
        # Where a logit is 0 but for rounding, either is right.
        assert (found == (logits > 0))[np.abs(logits) > 1e-4].all()


def test_latency_of_head_masks_and_detector(
    drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path, head: Path
) -> None:
    live = TimedDetector(str(rtdetr_folder), scenes_folder / "images")
    summary = run_evaluate(
        EvaluateConfig(drawn_cache, head, extras=frozenset(), live=live),
        SilentReporter(),
    )
    assert set(summary.latency) == {"head", "post_processing", "detector"}
    assert all(0 < t.median <= t.p90 < 60 for t in summary.latency.values())
    loaded = load_head(head).head
    assert summary.parameters == sum(p.numel() for p in loaded.parameters())
    assert summary.macs > 0
    assert summary.boundary is None
    assert Latency.of([9.0, 1.0, 2.0, 3.0]).median == 2


def test_a_file_that_came_meanwhile_is_kept(
    drawn_cache: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = tmp_path / "r.json", evaluate.measure

    def measured(*arguments: Any, **named: Any) -> Any:
        path.write_text("[1]")
        return before(*arguments, **named)

    monkeypatch.setattr(evaluate, "measure", measured)
    with pytest.raises(OutputError, match=r"r\.json is there and was not written by this"):
        run_evaluate(
            EvaluateConfig(drawn_cache, head, extras=frozenset(), save_results=path),
            SilentReporter(),
        )
    assert path.read_text() == "[1]"
