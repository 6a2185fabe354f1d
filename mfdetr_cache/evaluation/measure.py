"""COCO metrics of a mask head on a cache."""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.open import Location
from mfdetr_cache.choices import Evaluator, Extra, Scoring, Which
from mfdetr_cache.errors import CacheError, MfdetrError
from mfdetr_cache.evaluation.baselines import box_masks, oracle_masks
from mfdetr_cache.evaluation.coco_metrics import (
    CocoMetrics,
    CocoReport,
    Kind,
    Result,
    coco_ground_truth,
    measure_results,
    told_of_empty_images,
    told_of_no_mask,
)
from mfdetr_cache.evaluation.confusion import confusions
from mfdetr_cache.evaluation.inference import MaskPrediction, masks_in_image, predict_masks
from mfdetr_cache.evaluation.oracles import ORACLES, Oracle, oracle_results, with_perfect_boxes
from mfdetr_cache.evaluation.overlap import tell_images_in_both
from mfdetr_cache.evaluation.results import box_results, mask_results
from mfdetr_cache.head.cost import head_cost
from mfdetr_cache.head.folder import HeadFolder, RunRecord, load_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_cache.read_ahead import read_ahead
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.types import CachedImage

_READ_AHEAD = 5
# Threads that paste and encode masks while the head is at the next image.
_WORKERS = 2


_METRICS = ("mask", "box", "floor", "ceiling", "boundary", "own")


@dataclass(frozen=True, slots=True)
class Latency:
    """Time per image, in seconds: median and 90th percentile."""

    median: float
    p90: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        """Quantiles over images; the first is a warm-up and skipped unless it is the only one."""
        timed = np.array(seconds[1:] or seconds)
        return cls(float(np.median(timed)), float(np.quantile(timed, 0.9)))


@dataclass(frozen=True, slots=True)
class EvaluateSummary:
    """Metrics of a head on a cache; what was not asked for is None or empty.

    Attributes:
        mask: Mask AP of the head.
        box: Box AP of the detector, or of the boxes that the head has moved.
        floor: Mask AP of the box as mask.
        ceiling: Mask AP of the annotated mask clipped to the predicted box.
        boundary: Boundary AP of the head.
        own: Mask AP of the detector's own masks; None also where it gives none.
        details: Recalls and categories of ``mask`` and ``box``; ``confusion`` if requested.
        latency: ``head`` and ``post_processing`` (masks at the original size, as RLE), and
            ``detector`` where it was timed.
        scoring: The rule of the final scores; never ``auto``.
        macs: Multiply-adds of the head for 100 boxes of an image of COCO's mean size, 800 x 1124.
        oracles: Mask AP of the head with one thing perfect, by oracle.
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
    scoring: Scoring
    parameters: int
    macs: int
    oracles: dict[Oracle, CocoMetrics]
    own: CocoMetrics | None = None

    def metrics(self) -> dict[str, dict[str, float] | None]:
        """Every set of metrics by name, in [0, 1]; None for what was not asked for."""
        found = {name: getattr(self, name) for name in _METRICS}
        return {name: m.to_dict() if m is not None else None for name, m in found.items()}


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
    """Metrics and COCO mask results of a head on a complete cache of the same detector.

    ``extras`` are measured besides mask and box AP.
    """
    if head.c1 is not None:
        cache.require_c1_map("evaluation")
    started = time.perf_counter()
    head.eval()
    found: dict[str, list[Result]] = defaultdict(list)
    head_seconds: list[float] = []
    pasting_seconds: list[float] = []
    reporter.start("evaluate", len(cache), "images")
    with ThreadPoolExecutor(_WORKERS, "masks") as pool:

        def predict(image: CachedImage) -> Callable[[], tuple[dict[str, list[Result]], float]]:
            begun = time.perf_counter()
            prediction = predict_masks(head, image, cache.spec, device, scoring)
            head_seconds.append(time.perf_counter() - begun)
            exact = None
            if "oracles" in extras:
                exact = predict_masks(head, with_perfect_boxes(image), cache.spec, device, scoring)
            return pool.submit(_score, cache, image, prediction, exact, extras).result

        images = images_of(cache, cache.rows, head.map_names)
        for of_image, seconds in read_ahead(predict, images, _WORKERS + 1):
            for name, results in of_image.items():
                found[name] += results
            pasting_seconds.append(seconds)
            reporter.advance()
    reporter.finish()
    truth = ground_truth_of(cache)
    for told in (told_of_no_mask(truth), told_of_empty_images(truth)):
        if told:
            reporter.warn(told)

    def report(name: str, kind: Kind = "segm") -> CocoReport:
        return measure_results(truth, found[name], kind, evaluator)

    mask, box = report("mask"), report("box", "bbox")
    with_baselines, with_oracles = "baselines" in extras, "oracles" in extras
    details: dict[str, Any] = {"mask": mask.details(), "box": box.details()}
    if "confusion" in extras:
        details["confusion"] = [asdict(c) for c in confusions(truth, found["mask"])]
    by_itself: Scoring = "iou" if head.config.mask_scoring else "mean"
    cost = head_cost(head.config, cache.spec)
    summary = EvaluateSummary(
        num_images=len(cache),
        mask=mask.metrics,
        box=box.metrics,
        floor=report("floor").metrics if with_baselines else None,
        ceiling=report("ceiling").metrics if with_baselines else None,
        boundary=report("mask", "boundary").metrics if "boundary" in extras else None,
        details=details,
        seconds=time.perf_counter() - started,
        latency={"head": Latency.of(head_seconds), "post_processing": Latency.of(pasting_seconds)},
        scoring=by_itself if scoring == "auto" else scoring,
        parameters=cost.parameters,
        macs=cost.macs,
        oracles={name: report(name).metrics for name in ORACLES if with_oracles},
    )
    return summary, found["mask"]


def open_to_measure(
    location: Location, head: Path, reporter: Reporter, which: Which = "last"
) -> tuple[FeatureCache, HeadFolder]:
    """A complete cache and a trained head of the same detector.

    The images are those that the head has not learned from, if it learned from this cache. Raises
    CacheError (missing, unfinished or damaged), HeadError (no trained head) or IdentityError
    (different detectors).
    """
    cache, folder = open_with_head(location, head, which)
    if folder.unfinished:
        reporter.warn(folder.unfinished)
    return _unseen(cache, folder.run, reporter), folder


def open_with_head(
    location: Location, head: Path, which: Which = "last"
) -> tuple[FeatureCache, HeadFolder]:
    """As :func:`open_to_measure`, with all images of the cache."""
    cache = FeatureCache.open(location)
    folder = load_head(head, which)
    require_same(
        folder.detector, f"head {head}", detector_identity(cache.spec), f"cache {cache.path}"
    )
    cache.require_complete()
    return cache, folder


def _unseen(cache: FeatureCache, run: RunRecord, reporter: Reporter) -> FeatureCache:
    """The ``val_split`` images of a cache that the head learned from; any other one unchanged."""
    val_split = run.learned_from.get(cache.cache_id)
    if val_split is None:
        _tell_seen(cache, run, reporter)
        return cache
    if not val_split:
        reporter.warn(f"the head was trained on the images of {cache.path}: this is no validation")
        return cache
    _, unseen = cache.split(val_split)
    reporter.say(f"measuring on the {len(unseen)} images that the training left out")
    return unseen


def _tell_seen(cache: FeatureCache, run: RunRecord, reporter: Reporter) -> None:
    """Warn of images that the head has learned from in another cache, if that is still there."""
    path = (run.cache or {}).get("path")
    if path is None or not Path(path).is_dir():
        return
    with suppress(MfdetrError):
        tell_images_in_both(cache, FeatureCache.open(path), reporter)


def ground_truth_of(cache: FeatureCache, rows: Sequence[int] | None = None) -> COCO:
    """The annotated objects of a complete cache, or of some rows, as an indexed ``COCO``."""
    images = (
        (cache.image_id(r), cache.geometry(r).original_hw, cache.ground_truth(r))
        for r in (cache.rows if rows is None else rows)
    )
    return coco_ground_truth(images, cache.categories)


def require_same_truth(first: FeatureCache, other: FeatureCache) -> None:
    """Refuse caches that are not of the same objects on the same images; CacheError."""
    for what, ours, theirs in (
        ("annotations", first.annotations.source["sha256"], other.annotations.source["sha256"]),
        ("classes", first.is_class_agnostic, other.is_class_agnostic),
        ("images", *([c.image_id(r) for r in c.rows] for c in (first, other))),
    ):
        if ours != theirs:
            raise CacheError(
                f"{first.path} and {other.path} are of other {what}: what is measured on them "
                "cannot be compared"
            )


def images_of(
    cache: FeatureCache, rows: Sequence[int], map_names: tuple[str, ...]
) -> Iterator[CachedImage]:
    """Rows of a cache with some of their maps, read ahead in a thread."""
    with ThreadPoolExecutor(1, "reader") as pool:
        yield from read_ahead(
            lambda row: pool.submit(cache.read, row, map_names).result, rows, _READ_AHEAD
        )


def _score(
    cache: FeatureCache,
    image: CachedImage,
    prediction: MaskPrediction,
    exact: MaskPrediction | None,
    extras: Collection[Extra],
) -> tuple[dict[str, list[Result]], float]:
    """COCO results of an image by what they are, and the seconds of its masks at original size."""
    size_hw, labels = image.geometry.original_hw, cache.label_categories
    detections, image_id = prediction.detections, image.image_id
    begun = time.perf_counter()
    rles = masks_in_image(prediction, size_hw)
    seconds = time.perf_counter() - begun
    found = {
        "box": box_results(image_id, detections, labels),
        "mask": mask_results(image_id, detections, labels, rles, prediction.confidences),
    }
    if exact is not None:
        found |= oracle_results(image, detections, labels, rles, prediction.confidences)
        there = masks_in_image(exact, size_hw)
        found["boxes"] = mask_results(image_id, exact.detections, labels, there, exact.confidences)
    if "baselines" in extras:
        scores = detections.class_scores.double().numpy()
        squares = box_masks(detections, size_hw)
        annotated = oracle_masks(detections, image.ground_truth, labels, size_hw)
        found["floor"] = mask_results(image_id, detections, labels, squares, scores)
        found["ceiling"] = mask_results(image_id, detections, labels, annotated, scores)
    return found, seconds
