"""Evaluate: masks of a trained head for a cached split, measured as COCO does."""

import io
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.registry import load_same_detector
from mfdetr_cache.evaluation.coco_metrics import Result
from mfdetr_cache.evaluation.measure import EvaluateSummary, Latency, measure, open_to_measure
from mfdetr_cache.evaluation.results import json_results
from mfdetr_cache.files import require_free, write_atomically
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_cache.ops.devices import keep_freed_memory, torch_device
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.config.evaluate import EvaluateConfig

_TIMED_IMAGES = 20


def run_evaluate(config: EvaluateConfig, reporter: Reporter) -> EvaluateSummary:
    """Measure a trained head on a cache.

    Raises CacheError (missing, unfinished or damaged), HeadError (no trained head) or IdentityError
    (head and cache come from different detectors).
    """
    assert config.cache is not None  # checked with the settings: it is these, or a results file
    assert config.head is not None
    if config.save_results is not None:
        # A list of results has no room for a word of who wrote it.
        require_free(config.save_results, "--save-results")
    cache, folder = open_to_measure(
        config.local_cache.before(config.cache), config.head, reporter, config.which
    )
    device = torch_device(config.device)
    keep_freed_memory()
    summary, masks = measure(
        cache,
        folder.head.to(device),
        device,
        reporter,
        config.extras,
        scoring=config.scoring,
        evaluator=config.evaluator,
    )
    if folder.run.held_out:
        parts = seen_and_unseen(summary.details["mask"]["categories"], folder.run.held_out)
        summary = replace(summary, details={**summary.details, "held_out": parts})
    if config.live.weights is not None and config.live.images is not None:
        timed = _detector_latency(cache, config.live.weights, config.live.images, device)
        latency = {**summary.latency, "detector": timed}
        summary = replace(summary, latency=latency)
    if config.save_results is not None:
        write_atomically(config.save_results, _results_file(config.save_results, masks))
    return summary


def _results_file(path: Path, masks: Sequence[Result]) -> bytes:
    """A COCO results file; in a zip, under the zip's name, if the path says so."""
    if path.suffix.lower() != ".zip":
        return json_results(masks)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{path.stem}.json", json_results(masks))
    return packed.getvalue()


def seen_and_unseen(
    categories: Sequence[dict[str, Any]], held_out: Sequence[int]
) -> dict[str, float]:
    """Mask AP of the categories a head was trained on, and of those held out.

    ``seen_AP`` and ``unseen_AP``: means over categories with objects, in [0, 1]; -1 for none.
    """

    def mean(unseen: bool) -> float:  # noqa: FBT001
        values = [
            c["AP"] for c in categories if c["objects"] and (c["category_id"] in held_out) == unseen
        ]
        return float(np.mean(values)) if values else -1.0

    return {"seen_AP": mean(False), "unseen_AP": mean(True)}


def _detector_latency(
    cache: FeatureCache, weights: str, images: Path, device: torch.device
) -> Latency:
    """Detector time on the first images, one at a time."""
    detector = load_same_detector(cache.spec.detector, weights, detector_identity(cache.spec))
    require_same(
        detector_identity(detector.spec),
        f"--weights {weights}",
        detector_identity(cache.spec),
        f"cache {cache.path}",
    )
    detector.to(device)
    seconds = []
    for row in cache.rows[:_TIMED_IMAGES]:
        picture = load_image(images / cache.file_name(row), cache.geometry(row).original_hw)
        pixels = detector.preprocess(picture)[None].to(device)
        begun = time.perf_counter()
        detector.forward(pixels).class_logits.cpu()
        seconds.append(time.perf_counter() - begun)
    return Latency.of(seconds)
