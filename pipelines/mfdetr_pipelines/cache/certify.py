"""Cache certify: the mask AP that a preset costs, measured with one head and kept in the cache."""

import hashlib
from collections.abc import Callable

import torch

from mfdetr_cache.cache.certificate import Certificate, write_certificate
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import CacheError
from mfdetr_cache.evaluation.bootstrap import WeightedAP, differences_to_first
from mfdetr_cache.evaluation.coco_metrics import Result
from mfdetr_cache.evaluation.inference import (
    MaskPrediction,
    masks_in_image,
    predict_live,
    predict_masks,
)
from mfdetr_cache.evaluation.measure import ground_truth_of, open_with_head
from mfdetr_cache.evaluation.results import mask_results
from mfdetr_cache.extraction.again import detector_of_cache, input_of_row
from mfdetr_cache.head.folder import HEAD_FILE
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_cache.ops.devices import keep_freed_memory, torch_device
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.config.cache import CertifyConfig


def run_certify(config: CertifyConfig, reporter: Reporter) -> Certificate:
    """Measure one head on quantised and on finer features; the certificate is kept in the cache.

    CacheError if the caches hold different images or there is no reference; IdentityError if head,
    cache and reference come from different detectors.
    """
    cache, folder = open_with_head(config.cache, config.head)
    device = torch_device(config.device)
    keep_freed_memory()
    head = folder.head.to(device)
    name, predict = _reference(config, cache, head, device)
    first = _results(cache, predict, reporter, f"head on {name} features")
    second = _results(
        cache,
        lambda row: predict_masks(head, cache.read(row, head.map_names), cache.spec, device),
        reporter,
        f"head on {cache.layout.preset} features",
    )
    truth = ground_truth_of(cache)
    reporter.say(f"paired bootstrap over {len(cache)} images, {config.samples} samples")
    aps = [[WeightedAP(truth, results)] for results in (first, second)]
    (measured,) = differences_to_first(aps, config.samples)
    weights = hashlib.sha256((config.head / HEAD_FILE).read_bytes()).hexdigest()[:16]
    certificate = Certificate(
        preset=cache.layout.preset,
        reference=name,
        head=weights,
        images=len(cache),
        AP_reference=measured.first,
        AP=measured.second,
        difference=measured.difference,
        low=measured.low,
        high=measured.high,
        samples=measured.samples,
    )
    write_certificate(cache.storage, certificate)
    return certificate


def _reference(
    config: CertifyConfig, cache: FeatureCache, head: MaskHead, device: torch.device
) -> tuple[str, Callable[[int], MaskPrediction]]:
    """Name of the reference features; the head's masks on them, by row of the certified cache."""
    if config.reference is not None:
        other = FeatureCache.open(config.reference)
        require_same(
            detector_identity(cache.spec),
            f"cache {cache.path}",
            detector_identity(other.spec),
            f"cache {other.path}",
        )
        other.require_complete()
        row_of = {other.image_id(r): r for r in other.rows}
        missing = [cache.image_id(r) for r in cache.rows if cache.image_id(r) not in row_of]
        if missing:
            raise CacheError(f"{other.path} lacks image {missing[0]} and {len(missing) - 1} others")

        def finer(row: int) -> MaskPrediction:
            image = other.read(row_of[cache.image_id(row)], head.map_names)
            return predict_masks(head, image, cache.spec, device)

        return other.layout.preset, finer
    weights, images = config.detector.weights, config.detector.images
    if weights is None or images is None:
        raise CacheError("certify compares: give --reference CACHE, or --weights and --images")
    detector = detector_of_cache(cache, weights, device)

    def live(row: int) -> MaskPrediction:
        output = detector.forward(input_of_row(cache, detector, row, images)[None].to(device))
        return predict_live(head, output, cache.geometry(row), cache.spec)

    return "live", live


def _results(
    cache: FeatureCache, predict: Callable[[int], MaskPrediction], reporter: Reporter, task: str
) -> list[Result]:
    reporter.start(task, len(cache), "images")
    results: list[Result] = []
    for row in cache.rows:
        prediction = predict(row)
        rles = masks_in_image(prediction, cache.original_hw(row))
        labels = cache.label_categories
        results += mask_results(
            cache.image_id(row), prediction.detections, labels, rles, prediction.confidences
        )
        reporter.advance()
    reporter.finish()
    return results
