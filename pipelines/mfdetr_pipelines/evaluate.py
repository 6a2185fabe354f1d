"""Evaluate: masks of a trained head for a cached split, measured as COCO does."""

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pycocotools.coco import COCO

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.devices import torch_device
from mfdetr_cache.evaluation.baselines import box_masks, oracle_masks
from mfdetr_cache.evaluation.coco_metrics import (
    CocoMetrics,
    Result,
    coco_ground_truth,
    evaluate_results,
)
from mfdetr_cache.evaluation.inference import (
    MaskPrediction,
    Scoring,
    masks_in_image,
    predict_masks,
)
from mfdetr_cache.evaluation.results import box_results, mask_results
from mfdetr_cache.head.folder import Which, load_head, write_atomically
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_cache.protocols import Reporter
from mfdetr_cache.types import CachedImage

_READ_AHEAD = 4


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """What ``mfdetr evaluate`` is told.

    Attributes:
        cache: A complete cache of the split to measure on.
        head: Run folder of a trained head.
        device: Where the head runs.
        baselines: Also measure the floor and the ceiling.
        results: Write COCO results here.
        scoring: How the class score becomes the final one.
        which: Weights of the end of the training, or of its best validation.
    """

    cache: Path
    head: Path
    device: str = "cpu"
    baselines: bool = True
    results: Path | None = None
    scoring: Scoring = "auto"
    which: Which = "last"


@dataclass(frozen=True, slots=True)
class EvaluateSummary:
    """What was measured.

    Attributes:
        num_images: Images measured on.
        mask: Mask AP of the head.
        box: Box AP of the detector.
        floor: Mask AP of the box as mask; None if not asked for.
        ceiling: Mask AP of the annotated mask clipped to the predicted box; None if not asked for.
        seconds: Whole time.
        head_seconds: Part of it spent in the mask network.
    """

    num_images: int
    mask: CocoMetrics
    box: CocoMetrics
    floor: CocoMetrics | None
    ceiling: CocoMetrics | None
    seconds: float
    head_seconds: float

    def metrics(self) -> dict[str, dict[str, float] | None]:
        """Every set of metrics by name, in [0, 1]; None for what was not asked for."""
        sets = {
            "mask": self.mask,
            "box": self.box,
            "floor": self.floor,
            "ceiling": self.ceiling,
        }
        return {name: m.to_dict() if m is not None else None for name, m in sets.items()}


@dataclass
class _Collected:
    """COCO results of all images so far."""

    box: list[Result] = field(default_factory=list)
    mask: list[Result] = field(default_factory=list)
    floor: list[Result] = field(default_factory=list)
    ceiling: list[Result] = field(default_factory=list)
    head_seconds: float = 0.0


def run_evaluate(config: EvaluateConfig, reporter: Reporter) -> EvaluateSummary:
    """Measure a trained head on a cache.

    Args:
        config: What to measure.
        reporter: Who is told about progress.

    Returns:
        The metrics.

    Raises:
        CacheError: If the cache is missing, unfinished or damaged.
        HeadError: If there is no trained head.
        IdentityError: If head and cache come from different detectors.
    """
    cache = FeatureCache.open(config.cache)
    folder = load_head(config.head, config.which)
    require_same(
        folder.detector, f"head {config.head}", detector_identity(cache.spec), f"cache {cache.path}"
    )
    cache.require_complete()
    device = torch_device(config.device)
    summary, collected = measure(
        cache,
        folder.head.to(device),
        device,
        reporter,
        baselines=config.baselines,
        scoring=config.scoring,
    )
    if config.results is not None:
        write_atomically(config.results, json_results(collected))
    return summary


def measure(
    cache: FeatureCache,
    head: MaskHead,
    device: torch.device,
    reporter: Reporter,
    *,
    baselines: bool,
    scoring: Scoring = "auto",
) -> tuple[EvaluateSummary, list[Result]]:
    """Metrics of a head on a complete cache of the same detector.

    Args:
        cache: The cache.
        head: The head, on the device.
        device: Where it runs.
        reporter: Who is told about progress.
        baselines: Also measure the floor and the ceiling.
        scoring: How the class score becomes the final one.

    Returns:
        The metrics, and the head's COCO mask results.
    """
    if head.c1 is not None:
        cache.require_c1_map("evaluation")
    started = time.perf_counter()
    head.eval()
    collected = _Collected()
    reporter.start("evaluate", len(cache), "images")
    for image in _images(cache, head.map_names):
        started_head = time.perf_counter()
        prediction = predict_masks(head, image, cache.spec, device, scoring)
        collected.head_seconds += time.perf_counter() - started_head
        _collect(collected, cache, image, prediction, baselines=baselines)
        reporter.advance()
    reporter.finish()
    truth = ground_truth_of(cache)
    summary = EvaluateSummary(
        num_images=len(cache),
        mask=evaluate_results(truth, collected.mask, "segm"),
        box=evaluate_results(truth, collected.box, "bbox"),
        floor=evaluate_results(truth, collected.floor, "segm") if baselines else None,
        ceiling=evaluate_results(truth, collected.ceiling, "segm") if baselines else None,
        seconds=time.perf_counter() - started,
        head_seconds=collected.head_seconds,
    )
    return summary, collected.mask


def ground_truth_of(cache: FeatureCache) -> COCO:
    """The annotated objects of a cache's images, as pycocotools takes them.

    Args:
        cache: A complete cache.

    Returns:
        An indexed ``COCO``.
    """
    images = (
        (cache.image_id(r), cache.geometry(r).original_hw, cache.ground_truth(r))
        for r in cache.rows
    )
    return coco_ground_truth(images, cache.categories)


def _images(cache: FeatureCache, map_names: tuple[str, ...]) -> Iterator[CachedImage]:
    with ThreadPoolExecutor(1, "reader") as pool:
        ahead: deque[Future[CachedImage]] = deque()
        for row in cache.rows:
            ahead.append(pool.submit(cache.read, row, map_names))
            if len(ahead) > _READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _collect(
    collected: _Collected,
    cache: FeatureCache,
    image: CachedImage,
    prediction: MaskPrediction,
    *,
    baselines: bool,
) -> None:
    size_hw, labels = image.geometry.original_hw, cache.label_categories
    detections, image_id = prediction.detections, image.image_id
    rles = masks_in_image(prediction, size_hw)
    collected.box += box_results(image_id, detections, labels)
    collected.mask += mask_results(image_id, detections, labels, rles, prediction.confidences)
    if baselines:
        scores = detections.class_scores.double().numpy()
        floor = box_masks(detections, size_hw)
        ceiling = oracle_masks(detections, image.ground_truth, labels, size_hw)
        collected.floor += mask_results(image_id, detections, labels, floor, scores)
        collected.ceiling += mask_results(image_id, detections, labels, ceiling, scores)


def json_results(results: Sequence[Result]) -> bytes:
    """Mask results as a COCO results file.

    Args:
        results: With compressed RLE.

    Returns:
        JSON.
    """
    plain = []
    for result in results:
        rle = result["segmentation"]
        counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
        plain.append({**result, "segmentation": {"size": rle["size"], "counts": counts}})
    return json.dumps(plain).encode()
