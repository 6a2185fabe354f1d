"""Evaluate: masks of a trained head for a cached split, measured as COCO does."""

import json
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools.coco import COCO

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage import Location
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.options import options_of
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.devices import torch_device
from mfdetr_cache.evaluation.baselines import box_masks, oracle_masks
from mfdetr_cache.evaluation.coco_metrics import (
    CocoMetrics,
    CocoReport,
    Evaluator,
    Kind,
    Result,
    coco_ground_truth,
    measure_results,
)
from mfdetr_cache.evaluation.inference import (
    MaskPrediction,
    Scoring,
    masks_in_image,
    predict_masks,
)
from mfdetr_cache.evaluation.oracles import (
    ORACLES,
    Oracle,
    oracle_results,
    with_perfect_boxes,
)
from mfdetr_cache.evaluation.results import box_results, mask_results
from mfdetr_cache.files import write_atomically
from mfdetr_cache.head.cost import head_cost
from mfdetr_cache.head.folder import Which, load_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_cache.memory import keep_freed_memory
from mfdetr_cache.protocols import Reporter
from mfdetr_cache.types import CachedImage

# Floor and ceiling; boundary AP; AP with one thing perfect at a time.
Extra = Literal["baselines", "boundary", "oracles"]
EXTRAS: tuple[Extra, ...] = ("baselines", "boundary", "oracles")
_READ_AHEAD = 4
# Threads that paste and encode masks while the head is at the next image.
_WORKERS = 2
_TIMED_IMAGES = 20


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
        evaluator: Who computes AP.
        boundary: Measure boundary AP too.
        live: Weights and image folder, to time the detector beside the head.
        oracles: Also measure what AP would be if one thing were perfect.
    """

    cache: Location
    head: Path
    device: str = "cpu"
    baselines: bool = True
    results: Path | None = None
    scoring: Scoring = "auto"
    which: Which = "last"
    evaluator: Evaluator = "fast"
    boundary: bool = True
    live: tuple[str, Path] | None = None
    oracles: bool = False


@dataclass(frozen=True, slots=True)
class Latency:
    """Time per image, in seconds.

    Attributes:
        median: Half of the images took no longer.
        p90: Nine in ten took no longer.
    """

    median: float
    p90: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        """Of some images; the first is left out where there are more, it warms up.

        Args:
            seconds: Time of each image, at least one.

        Returns:
            The two quantiles.
        """
        timed = np.array(seconds[1:] or seconds)
        return cls(float(np.median(timed)), float(np.quantile(timed, 0.9)))


@dataclass(frozen=True, slots=True)
class EvaluateSummary:
    """What was measured.

    Attributes:
        num_images: Images measured on.
        mask: Mask AP of the head.
        box: Box AP of the detector.
        floor: Mask AP of the box as mask; None if not asked for.
        ceiling: Mask AP of the annotated mask clipped to the predicted box; None if not asked for.
        boundary: Boundary AP of the head; None if not asked for.
        details: Recalls and categories of ``mask`` and ``box``.
        seconds: Whole time.
        latency: ``head`` and ``post_processing`` (masks at the original size, as RLE), and
            ``detector`` where it was timed.
        parameters: Of the head.
        macs: Multiply-adds of the head for the median input of this cache, 100 queries.
        oracles: Mask AP of the head with one thing perfect, by what; empty if not asked for.
    """

    num_images: int
    mask: CocoMetrics
    box: CocoMetrics
    floor: CocoMetrics | None
    ceiling: CocoMetrics | None
    boundary: CocoMetrics | None
    details: dict[str, Any]
    seconds: float
    latency: dict[str, Latency]
    parameters: int
    macs: int
    oracles: dict[Oracle, CocoMetrics]

    def metrics(self) -> dict[str, dict[str, float] | None]:
        """Every set of metrics by name, in [0, 1]; None for what was not asked for."""
        sets = {
            "mask": self.mask,
            "box": self.box,
            "floor": self.floor,
            "ceiling": self.ceiling,
            "boundary": self.boundary,
        }
        return {name: m.to_dict() if m is not None else None for name, m in sets.items()}


@dataclass(frozen=True, slots=True)
class _Scored:
    """COCO results of one image."""

    box: list[Result]
    mask: list[Result]
    floor: list[Result]
    ceiling: list[Result]
    oracles: dict[Oracle, list[Result]]
    seconds: float


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
    cache = _unseen(cache, folder.document, reporter)
    device = torch_device(config.device)
    keep_freed_memory()
    summary, masks = measure(
        cache,
        folder.head.to(device),
        device,
        reporter,
        [extra for extra in EXTRAS if getattr(config, extra)],
        scoring=config.scoring,
        evaluator=config.evaluator,
    )
    held_out = folder.document.get("train", {}).get("held_out", [])
    if held_out:
        parts = seen_and_unseen(summary.details["mask"]["categories"], held_out)
        summary = replace(summary, details={**summary.details, "held_out": parts})
    if config.live is not None:
        latency = {**summary.latency, "detector": _detector_latency(config, cache)}
        summary = replace(summary, latency=latency)
    if config.results is not None:
        write_atomically(config.results, json_results(masks))
    return summary


def _unseen(cache: FeatureCache, document: Mapping[str, Any], reporter: Reporter) -> FeatureCache:
    """Of the cache a head was trained from, the images it was not trained on."""
    split = document.get("train", {}).get("val_split", 0)
    if document.get("cache", {}).get("cache_id") != cache.cache_id:
        return cache
    if not split:
        reporter.warn(f"the head was trained on the images of {cache.path}: this is no validation")
        return cache
    _, unseen = cache.split(split)
    reporter.say(f"measuring on the {len(unseen)} images that the training left out")
    return unseen


def measure(
    cache: FeatureCache,
    head: MaskHead,
    device: torch.device,
    reporter: Reporter,
    extras: Collection[Extra] = (),
    *,
    scoring: Scoring = "auto",
    evaluator: Evaluator = "fast",
) -> tuple[EvaluateSummary, list[Result]]:
    """Metrics of a head on a complete cache of the same detector.

    Args:
        cache: The cache.
        head: The head, on the device.
        device: Where it runs.
        reporter: Who is told about progress.
        extras: What to measure beside mask and box AP.
        scoring: How the class score becomes the final one.
        evaluator: Who computes AP.

    Returns:
        The metrics, and the head's COCO mask results.
    """
    if head.c1 is not None:
        cache.require_c1_map("evaluation")
    baselines, boundary, oracles = (extra in extras for extra in EXTRAS)
    started = time.perf_counter()
    head.eval()
    scored: list[_Scored] = []
    head_seconds: list[float] = []
    reporter.start("evaluate", len(cache), "images")
    with ThreadPoolExecutor(_WORKERS, "masks") as pool:
        behind: deque[Future[_Scored]] = deque()
        for image in _images(cache, head.map_names):
            begun = time.perf_counter()
            prediction = predict_masks(head, image, cache.spec, device, scoring)
            head_seconds.append(time.perf_counter() - begun)
            exact = None
            if oracles:
                exact = predict_masks(head, with_perfect_boxes(image), cache.spec, device, scoring)
            behind.append(pool.submit(_score, cache, image, prediction, exact, baselines=baselines))
            # Bounded, so that memory is that of a few images however many there are.
            if len(behind) > _WORKERS:
                scored.append(behind.popleft().result())
            reporter.advance()
        scored += [future.result() for future in behind]
    reporter.finish()
    truth = ground_truth_of(cache)
    masks = [r for s in scored for r in s.mask]

    def metrics(results: list[Result], kind: Kind) -> CocoReport:
        return measure_results(truth, results, kind, evaluator)

    mask = metrics(masks, "segm")
    box = metrics([r for s in scored for r in s.box], "bbox")
    floor = metrics([r for s in scored for r in s.floor], "segm").metrics if baselines else None
    ceiling = metrics([r for s in scored for r in s.ceiling], "segm").metrics if baselines else None
    sizes = sorted(cache.geometry(r).input_hw for r in cache.rows)
    cost = head_cost(head.config, cache.spec, sizes[len(sizes) // 2])
    summary = EvaluateSummary(
        num_images=len(cache),
        mask=mask.metrics,
        box=box.metrics,
        floor=floor,
        ceiling=ceiling,
        boundary=metrics(masks, "boundary").metrics if boundary else None,
        details={"mask": mask.details(), "box": box.details()},
        seconds=time.perf_counter() - started,
        latency={
            "head": Latency.of(head_seconds),
            "post_processing": Latency.of([s.seconds for s in scored]),
        },
        parameters=cost.parameters,
        macs=cost.macs,
        oracles={
            name: metrics([r for s in scored for r in s.oracles[name]], "segm").metrics
            for name in ORACLES
            if oracles
        },
    )
    return summary, masks


def seen_and_unseen(
    categories: Sequence[dict[str, Any]], held_out: Sequence[int]
) -> dict[str, float]:
    """Mask AP of the categories a head was trained on, and of those it never saw.

    Args:
        categories: Per-category metrics.
        held_out: Ids of the hidden ones.

    Returns:
        ``seen_AP`` and ``unseen_AP``, means over categories with objects, in [0, 1]; -1 for none.
    """

    def mean(unseen: bool) -> float:  # noqa: FBT001
        values = [
            c["AP"] for c in categories if c["objects"] and (c["category_id"] in held_out) == unseen
        ]
        return float(np.mean(values)) if values else -1.0

    return {"seen_AP": mean(False), "unseen_AP": mean(True)}


def _detector_latency(config: EvaluateConfig, cache: FeatureCache) -> Latency:
    """Time of the detector's forward on the first images, one at a time."""
    assert config.live is not None
    weights, images = config.live
    kind = cache.spec.name.split(":")[0]
    detector = load_detector(kind, weights, options_of(detector_identity(cache.spec)))
    require_same(
        detector_identity(detector.spec),
        f"--weights {weights}",
        detector_identity(cache.spec),
        f"cache {cache.path}",
    )
    device = torch_device(config.device)
    detector.to(device)
    seconds = []
    for row in cache.rows[:_TIMED_IMAGES]:
        picture = load_image(images / cache.file_name(row), cache.geometry(row).original_hw)
        pixels = detector.preprocess(picture)[None].to(device)
        begun = time.perf_counter()
        detector.forward(pixels).class_logits.cpu()
        seconds.append(time.perf_counter() - begun)
    return Latency.of(seconds)


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


def _score(
    cache: FeatureCache,
    image: CachedImage,
    prediction: MaskPrediction,
    exact: MaskPrediction | None,
    *,
    baselines: bool,
) -> _Scored:
    """Masks of one image at the original size and everything else COCO wants to know."""
    size_hw, labels = image.geometry.original_hw, cache.label_categories
    detections, image_id = prediction.detections, image.image_id
    begun = time.perf_counter()
    rles = masks_in_image(prediction, size_hw)
    seconds = time.perf_counter() - begun
    mask = mask_results(image_id, detections, labels, rles, prediction.confidences)
    oracles: dict[Oracle, list[Result]] = {}
    if exact is not None:
        oracles = oracle_results(image, detections, labels, rles, prediction.confidences)
        there = masks_in_image(exact, size_hw)
        oracles["boxes"] = mask_results(
            image_id, exact.detections, labels, there, exact.confidences
        )
    floor, ceiling = [], []
    if baselines:
        scores = detections.class_scores.double().numpy()
        squares = box_masks(detections, size_hw)
        annotated = oracle_masks(detections, image.ground_truth, labels, size_hw)
        floor = mask_results(image_id, detections, labels, squares, scores)
        ceiling = mask_results(image_id, detections, labels, annotated, scores)
    box = box_results(image_id, detections, labels)
    return _Scored(box, mask, floor, ceiling, oracles, seconds)


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
