"""Baselines without a trained head, on a cache's detections."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.choices import Baseline
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.sam import SamPrompter
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.evaluation.baselines import box_masks, ellipse_masks, oracle_masks
from mfdetr_cache.evaluation.coco_metrics import Result, evaluate_results
from mfdetr_cache.evaluation.detections import Detections, detections_of
from mfdetr_cache.evaluation.measure import ground_truth_of
from mfdetr_cache.evaluation.results import box_results, mask_results
from mfdetr_cache.ops.devices import torch_device
from mfdetr_cache.ops.masks import encode_mask
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.ablation.rows import BASELINES
from mfdetr_pipelines.config.ablate import AblateConfig


def measure_baseline(
    cache: FeatureCache, baseline: Baseline, config: AblateConfig, reporter: Reporter
) -> tuple[dict[str, dict[str, float]], list[Result]]:
    """``mask``, ``boundary`` and ``box`` AP of a baseline on a complete cache, and its COCO masks.

    ConfigError if SAM lacks weights or images.
    """
    prompter = None
    if baseline == "sam":
        if config.sam_weights is None or config.images is None:
            raise ConfigError("--baseline sam needs --sam-weights and --images")
        prompter = SamPrompter(config.sam_weights, torch_device(config.device))
    results: list[Result] = []
    boxes: list[Result] = []
    labels = cache.label_categories
    reporter.start(BASELINES[baseline], len(cache), "images")
    for row in cache.rows:
        image = cache.read(row, ())
        detections, size_hw = detections_of(image, cache.spec), image.geometry.original_hw
        scores = detections.class_scores.double().numpy()
        if prompter is not None and config.images is not None:
            picture = load_image(config.images / image.file_name, size_hw)
            rles, iou = _prompted(prompter, picture, detections)
            scores = scores * iou  # as Eq. 13
        elif baseline == "box":
            rles = box_masks(detections, size_hw)
        elif baseline == "ellipse":
            rles = ellipse_masks(detections, size_hw)
        else:
            rles = oracle_masks(detections, image.ground_truth, labels, size_hw)
        results += mask_results(image.image_id, detections, labels, rles, scores)
        boxes += box_results(image.image_id, detections, labels)
        reporter.advance()
    reporter.finish()
    truth = ground_truth_of(cache)
    metrics = {
        "mask": evaluate_results(truth, results, "segm").to_dict(),
        "boundary": evaluate_results(truth, results, "boundary").to_dict(),
        "box": evaluate_results(truth, boxes, "bbox").to_dict(),
    }
    return metrics, results


def _prompted(
    prompter: SamPrompter, picture: Image, detections: Detections
) -> tuple[list[dict[str, Any]], NDArray[np.float64]]:
    """SAM's masks with one prompt per query, as RLE, and its IoU in [0, 1], for each detection."""
    _, first, place = np.unique(
        detections.query_index.numpy(), return_index=True, return_inverse=True
    )
    masks, iou = prompter(picture, detections.boxes_xyxy.numpy()[first].astype(np.float32))
    rles = [encode_mask(m) for m in masks]
    return [rles[int(i)] for i in place], iou.clip(0, 1)[place]
