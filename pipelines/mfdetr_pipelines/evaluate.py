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
from torch import Tensor
from torch.nn import functional

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.coco.options import RENUMBERED
from mfdetr_cache.detectors.wrapped import with_own_masks
from mfdetr_cache.evaluation.coco_metrics import Result, measure_results
from mfdetr_cache.evaluation.detections import detections_of
from mfdetr_cache.evaluation.measure import (
    EvaluateSummary,
    Latency,
    ground_truth_of,
    measure,
    open_to_measure,
)
from mfdetr_cache.evaluation.results import json_results, mask_results
from mfdetr_cache.extraction.again import detector_of_cache, input_of_row
from mfdetr_cache.files import require_free, write_atomically
from mfdetr_cache.ops.devices import keep_freed_memory, torch_device
from mfdetr_cache.ops.masks import encode_mask
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
    summary = _with_detector(summary, cache, config, device, reporter)
    if config.save_results is not None:
        # Somebody may have written one in these minutes.
        require_free(config.save_results, "--save-results")
        named = _with_names(cache, masks, reporter)
        write_atomically(config.save_results, _results_file(config.save_results, named))
    return summary


def _with_names(
    cache: FeatureCache, masks: Sequence[Result], reporter: Reporter
) -> Sequence[Result]:
    """The results by names of files and categories where the cache has other ids than the user."""
    renumbered = cache.annotations.source.get(RENUMBERED, ())
    names: dict[str, dict[int, str]] = {}
    if "images" in renumbered:
        names["image_id"] = {cache.image_id(row): cache.file_name(row) for row in cache.rows}
    if "categories" in renumbered:
        names["category_id"] = category_names(cache.categories)
    if not names:
        return masks
    reporter.warn(
        f"ids of {' and '.join(renumbered)} are the cache's own, so the results have names in "
        f"{' and '.join(names)}; evaluate --results reads them"
    )
    return [{**r, **{key: of_id[r[key]] for key, of_id in names.items()}} for r in masks]


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


def _with_detector(
    summary: EvaluateSummary,
    cache: FeatureCache,
    config: EvaluateConfig,
    device: torch.device,
    reporter: Reporter,
) -> EvaluateSummary:
    """The summary with the time of the detector, if given, and metrics of its own masks, if any.

    These are scored by class. IdentityError for another detector than the cache's.
    """
    weights, images = config.live.weights, config.live.images
    if weights is None or images is None:
        return summary
    detector = detector_of_cache(cache, weights, device)

    def input_of(row: int) -> Tensor:
        return input_of_row(cache, detector, row, images)[None].to(device)

    seconds = []
    for row in cache.rows[:_TIMED_IMAGES]:
        pixels = input_of(row)
        begun = time.perf_counter()
        detector.forward(pixels).class_logits.cpu()
        seconds.append(time.perf_counter() - begun)
    latency = {**summary.latency, "detector": Latency.of(seconds)}
    masking = with_own_masks(detector)
    if masking is None:
        return replace(summary, latency=latency)
    results: list[Result] = []
    reporter.start("masks of the detector itself", len(cache), "images")
    for row in cache.rows:
        image, pixels = cache.read(row, ()), input_of(row)
        detections, labels = detections_of(image, cache.spec), cache.label_categories
        input_hw = (pixels.shape[-2], pixels.shape[-1])
        logits = masking.own_masks(detector.forward(pixels), input_hw)[0].cpu()
        queries, place = detections.query_index.unique(return_inverse=True)
        found = [_whole_mask(logits[q], image.geometry.original_hw) for q in queries.tolist()]
        rles = [found[i] for i in place.tolist()]
        scores = detections.class_scores.double().numpy()
        results += mask_results(image.image_id, detections, labels, rles, scores)
        reporter.advance()
    reporter.finish()
    own = measure_results(ground_truth_of(cache), results, "segm", config.evaluator).metrics
    return replace(summary, latency=latency, own=own)


def _whole_mask(logits: Tensor, size_hw: tuple[int, int]) -> dict[str, Any]:
    """COCO RLE of the logits (h, w) of a whole image, resized to it: where they are above 0."""
    resized = functional.interpolate(logits[None, None], size=size_hw, mode="bilinear")
    return encode_mask((resized[0, 0] > 0).numpy())
