"""Box AP of the detections in a cache."""

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics, evaluate_results
from mfdetr_cache.evaluation.detections import detections_of
from mfdetr_cache.evaluation.measure import ground_truth_of
from mfdetr_cache.evaluation.results import box_results
from mfdetr_cache.reporter import Reporter

# A COCO-trained DETR has a box AP of 30 or more; a wrongly assembled one was seen at 3.5. A fresh
# dataset's hard categories may pull a right one down, so this warns and does not stop.
IMPLAUSIBLE_BOX_AP = 0.10


def cached_box_metrics(cache: FeatureCache) -> CocoMetrics:
    """Box AP of the detections in a complete cache."""
    results = []
    for row in cache.rows:
        image = cache.read(row, map_names=())
        detections = detections_of(image, cache.spec)
        results += box_results(image.image_id, detections, cache.label_categories)
    return evaluate_results(ground_truth_of(cache), results, "bbox")


def judged_box_metrics(cache: FeatureCache, reporter: Reporter) -> CocoMetrics:
    """Box AP of a complete cache, with a warning if it is implausibly low."""
    box = cached_box_metrics(cache)
    # Without an object to find there is no AP, which is -1 then.
    if 0 <= box.AP < IMPLAUSIBLE_BOX_AP:
        reporter.warn(
            f"box AP of the cached detections is {100 * box.AP:.1f}: implausibly low for a "
            "trained detector. Wrong weights, wrong preprocessing or another dataset are likely; "
            "a mask network cannot be better than its boxes"
        )
    return box
