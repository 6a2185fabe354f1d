"""Baselines without a trained head, on a cache's detections."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.choices import Baseline
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.sam import SamPrompter
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.evaluation.baselines import box_masks, ellipse_masks, oracle_masks
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics, Result, evaluate_results
from mfdetr_cache.evaluation.detections import Detections, detections_of
from mfdetr_cache.evaluation.measure import ground_truth_of
from mfdetr_cache.evaluation.results import box_results, mask_results
from mfdetr_cache.ops.masks import encode_mask
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.types import CachedImage
from mfdetr_pipelines.ablation.rows import BASELINES

# RLE and final score of each detection.
Masks = tuple[list[dict[str, Any]], NDArray[np.float64]]


def measure_baseline(
    cache: FeatureCache,
    baseline: Baseline,
    reporter: Reporter,
    *,
    device: torch.device,
    sam_weights: str | None,
    images: Path | None,
) -> tuple[dict[str, CocoMetrics], list[Result]]:
    """``mask``, ``boundary`` and ``box`` AP of a baseline on a complete cache, and its COCO masks.

    The last three are for SAM alone; ConfigError if it lacks weights or images.
    """
    if baseline != "sam":
        masks_of = _simple_masks(cache, baseline)
    elif sam_weights is None or images is None:
        raise ConfigError("--baseline sam needs --sam-weights and --images")
    else:
        masks_of = _sam_masks(SamPrompter(sam_weights, device), images)
    results: list[Result] = []
    boxes: list[Result] = []
    reporter.start(BASELINES[baseline], len(cache), "images")
    for row in cache.rows:
        image = cache.read(row, ())
        detections = detections_of(image, cache.spec)
        rles, scores = masks_of(image, detections)
        labels = cache.label_categories
        results += mask_results(image.image_id, detections, labels, rles, scores)
        boxes += box_results(image.image_id, detections, labels)
        reporter.advance()
    reporter.finish()
    truth = ground_truth_of(cache)
    metrics = {
        "mask": evaluate_results(truth, results, "segm"),
        "boundary": evaluate_results(truth, results, "boundary"),
        "box": evaluate_results(truth, boxes, "bbox"),
    }
    return metrics, results


def _simple_masks(
    cache: FeatureCache, baseline: Baseline
) -> Callable[[CachedImage, Detections], Masks]:
    def simple(image: CachedImage, detections: Detections) -> Masks:
        size_hw = image.geometry.original_hw
        if baseline == "box":
            rles = box_masks(detections, size_hw)
        elif baseline == "ellipse":
            rles = ellipse_masks(detections, size_hw)
        else:
            truth = image.ground_truth
            rles = oracle_masks(detections, truth, cache.label_categories, size_hw)
        return rles, detections.class_scores.double().numpy()

    return simple


def _sam_masks(prompter: SamPrompter, images: Path) -> Callable[[CachedImage, Detections], Masks]:
    """SAM with one prompt per query; the score is the class score times SAM's IoU (as Eq. 13)."""

    def prompted(image: CachedImage, detections: Detections) -> Masks:
        picture = load_image(images / image.file_name, image.geometry.original_hw)
        _, first, place = np.unique(
            detections.query_index.numpy(), return_index=True, return_inverse=True
        )
        boxes = detections.boxes_xyxy.numpy()[first].astype(np.float32)
        masks, iou = prompter(picture, boxes)
        rles = [encode_mask(m) for m in masks]
        scores = detections.class_scores.double().numpy() * iou.clip(0, 1)[place]
        return [rles[int(i)] for i in place], scores

    return prompted
