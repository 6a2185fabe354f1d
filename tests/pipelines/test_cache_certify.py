from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfdetr_pipelines.cache.certify import run_certify
from mfdetr_pipelines.cache.info import describe_cache
from mfdetr_pipelines.config.cache import CertifyConfig
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.shared import LiveDetector
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.certificate import read_certificates
from mfdetr_cache.errors import CacheError
from mfdetr_cache.evaluation.bootstrap import WeightedAP, differences_to_first
from mfdetr_cache.evaluation.coco_metrics import coco_ground_truth, evaluate_results
from mfdetr_cache.ops.masks import encode_mask
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.config import Length
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cache.types import GroundTruth
from tests.support.images import make_ground_truth
from tests.support.scenes import extract_config

CATEGORIES = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
SIZE = (60, 80)


def split(numbers: list[int], quality: float) -> tuple[Any, list[dict[str, Any]]]:
    """Ground truth and results of images; the same number gives the same image."""
    images, results = [], []
    for place, number in enumerate(numbers):
        random = np.random.default_rng(number)
        truth = make_ground_truth(SIZE, count=4, seed=number)
        columns = {f: getattr(truth, f) for f in GroundTruth.__dataclass_fields__}
        columns["category_ids"] = random.integers(1, 3, 4)
        columns["is_crowd"] = np.array([False, False, False, number % 3 == 0])
        columns["annotation_ids"] = truth.annotation_ids + 10 * place
        truth = GroundTruth(**columns)
        images.append((place + 1, SIZE, truth))
        for index in range(12):
            x0, y0, x1, y1 = truth.boxes_xyxy[index % 4]
            dx, dy = random.normal(scale=quality, size=2)
            mask = np.zeros(SIZE, dtype=bool)
            left, top = max(int(x0 + dx), 0), max(int(y0 + dy), 0)
            mask[top : int(y1 + dy) + 1, left : int(x1 + dx) + 1] = True
            results.append(
                {
                    "image_id": place + 1,
                    "category_id": int(truth.category_ids[index % 4]),
                    "score": float(random.random()),
                    "segmentation": encode_mask(mask),
                }
            )
    return coco_ground_truth(images, CATEGORIES), results


def test_every_image_once_is_cocos_ap() -> None:
    truth, results = split(list(range(8)), quality=3.0)
    wanted = evaluate_results(truth, results, "segm").AP
    assert 0.05 < wanted < 0.95
    assert WeightedAP(truth, results)(np.ones(8)) == pytest.approx(wanted, abs=1e-12)


def test_a_multiplicity_is_the_image_so_many_times() -> None:
    """Against pycocotools on a dataset in which images really are repeated or missing."""
    times = [0, 2, 1, 3, 0, 1]
    truth, results = split(list(range(6)), quality=3.0)
    repeated, its_results = split([n for n in range(6) for _ in range(times[n])], quality=3.0)
    found = WeightedAP(truth, results)(np.array(times, dtype=np.float64))
    assert found == pytest.approx(evaluate_results(repeated, its_results, "segm").AP, abs=1e-12)


@pytest.mark.parametrize("drawn", [0, 4])
def test_intervals_are_of_the_images_that_are_drawn(drawn: int) -> None:
    """Those of a dataset without the others; of one without any mask there is no AP."""
    truth, results = split(list(range(6)), quality=3.0)
    for annotation in truth.dataset["annotations"]:
        if annotation["image_id"] > drawn:
            del annotation["segmentation"]
    found = WeightedAP(truth, results)
    assert len(found.image_ids) == (drawn or 6)
    alone, its_results = split(list(range(drawn or 6)), quality=3.0)
    expected = WeightedAP(alone, its_results)(np.ones(drawn)) if drawn else -1.0
    assert found(np.ones(drawn or 6)) == expected
    measured = evaluate_results(truth, results, "segm")
    assert np.isclose(measured.AP, expected, rtol=0, atol=1e-12)
    (same,) = differences_to_first([[found], [found]], samples=5)
    assert same.difference == 0.0


def test_a_paired_interval_is_narrow_around_a_paired_difference() -> None:
    truth, good = split(list(range(12)), quality=1.5)
    _, bad = split(list(range(12)), quality=6.0)
    better, worse = WeightedAP(truth, good), WeightedAP(truth, bad)
    (found,) = differences_to_first([[worse], [better]], samples=200)
    assert 0 < found.low < found.difference < found.high
    assert [found] == differences_to_first([[worse], [better]], samples=200)
    (same,) = differences_to_first([[better], [better]], samples=20)
    assert (same.low, same.high) == (0.0, 0.0)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    drawn_cache: Path,
    scenes_folder: Path,
    rtdetr_folder: Path,
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("certify")
    config = extract_config(scenes_folder, str(rtdetr_folder), folder / "int4.zarr", preset="int4")
    run_extract(config, SilentReporter())
    small = {"hidden_dim": "8", "roi_size": "8", "image_layers": "1", "box_layers": "1"}
    small["fine_size"] = "0"
    recipe = build_recipe("fast", {**small, "min_match_iou": "0"})
    run_train_head(
        TrainHeadConfig(drawn_cache, folder / "head", recipe, length=Length(3)), SilentReporter()
    )
    return folder / "int4.zarr", folder / "head"


def test_a_certificate_is_measured_and_kept(
    made: tuple[Path, Path], drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    path, head = made
    config = CertifyConfig(path, head, reference=drawn_cache, samples=20)
    found = run_certify(config, SilentReporter())
    for cache, value in ((path, found.AP), (drawn_cache, found.AP_reference)):
        summary = run_evaluate(EvaluateConfig(cache, head, extras=frozenset()), SilentReporter())
        assert value == pytest.approx(summary.mask.AP, abs=1e-12)
    assert found.low <= found.difference <= found.high
    assert read_certificates(path) == (found,)
    assert describe_cache(path).certificates == (found,)
    source = LiveDetector(str(rtdetr_folder), scenes_folder / "images")
    live = run_certify(CertifyConfig(path, head, detector=source, samples=5), SilentReporter())
    assert live.reference == "live"
    # float16 rounds what the live detector gives; the head's masks hardly notice.
    assert live.AP_reference == pytest.approx(found.AP_reference, abs=0.02)
    assert len(read_certificates(path)) == 2


def test_nothing_to_compare_with_is_named(made: tuple[Path, Path]) -> None:
    with pytest.raises(CacheError, match="give --reference CACHE, or --weights and --images"):
        run_certify(CertifyConfig(*made), SilentReporter())
