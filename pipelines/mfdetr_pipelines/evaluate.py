"""Evaluate: masks of a trained head for a cached split, measured as COCO does."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.open import Location
from mfdetr_cache.choices import Evaluator, Scoring, Which
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.options import options_of
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.evaluation.coco_metrics import Result
from mfdetr_cache.evaluation.measure import EXTRAS, EvaluateSummary, Latency, measure
from mfdetr_cache.files import write_atomically
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_cache.ops.devices import keep_freed_memory, torch_device
from mfdetr_cache.reporter import Reporter

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
    detector = load_detector(
        cache.spec.detector, weights, options_of(detector_identity(cache.spec))
    )
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
