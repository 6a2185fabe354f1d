"""Box AP of the detections in a cache."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.evaluation.coco_metrics import (
    CocoMetrics,
    coco_ground_truth,
    evaluate_results,
    told_of_empty_images,
)
from mfdetr_cache.evaluation.detections import detections_of
from mfdetr_cache.evaluation.measure import ground_truth_of
from mfdetr_cache.evaluation.results import box_results
from mfdetr_cache.reporter import Reporter

# A COCO-trained DETR has a box AP of 30 or more; a wrongly assembled one was seen at 3.5. A fresh
# dataset's hard categories may pull a right one down, so this warns and does not stop.
IMPLAUSIBLE_BOX_AP = 0.10
# So many images tell whether annotations were made before or after rotation, if one of the two box
# APs is so many times the other.
_IMAGES_THAT_TELL, _CLEARLY_MORE = 64, 2


def cached_box_metrics(cache: FeatureCache, rows: Sequence[int] | None = None) -> CocoMetrics:
    """Box AP of the detections in a complete cache, or on some of its rows."""
    rows = cache.rows if rows is None else rows
    results = []
    for row in rows:
        image = cache.read(row, map_names=())
        detections = detections_of(image, cache.spec)
        results += box_results(image.image_id, detections, cache.label_categories)
    return evaluate_results(ground_truth_of(cache, rows), results, "bbox")


def judged_box_metrics(cache: FeatureCache, reporter: Reporter) -> CocoMetrics:
    """Box AP of a complete cache, with a warning if it is implausibly low."""
    box = judged = cached_box_metrics(cache)
    if told := told_of_empty_images(ground_truth_of(cache)):
        reporter.warn(told)
        # Images that nobody annotated yet tell nothing of the detector.
        judged = cached_box_metrics(cache, [r for r in cache.rows if len(cache.ground_truth(r))])
    # Without an object to find there is no AP, which is -1 then.
    if 0 <= judged.AP < IMPLAUSIBLE_BOX_AP:
        reporter.warn(
            f"box AP of the cached detections is {100 * judged.AP:.1f}: implausibly low for a "
            "trained detector. Wrong weights, wrong preprocessing or another dataset are likely; "
            "a mask network cannot be better than its boxes"
        )
    return box


def judge_orientations(
    cache: FeatureCache, orientations: Mapping[int, int], reporter: Reporter
) -> None:
    """Say whether annotations were made before or after EXIF rotation, where sizes cannot tell.

    The detector saw the rotated images. Its boxes fit the annotated ones, or these as they would be
    after rotation; nothing is said where they leave a doubt. ``orientations`` are those of EXIF by
    row of the complete cache, of images of the same size before and after.
    """
    if not orientations:
        return
    chosen = dict(islice(sorted(orientations.items()), _IMAGES_THAT_TELL))
    as_written, as_stored, results = [], [], []
    for row, orientation in chosen.items():
        image = cache.read(row, map_names=())
        size_hw, truth = cache.geometry(row).original_hw, cache.ground_truth(row)
        turned = turned_boxes(truth.boxes_xyxy, size_hw, orientation)
        as_written.append((image.image_id, size_hw, truth))
        as_stored.append((image.image_id, size_hw, replace(truth, boxes_xyxy=turned)))
        detections = detections_of(image, cache.spec)
        results += box_results(image.image_id, detections, cache.label_categories)
    after, before = (
        evaluate_results(coco_ground_truth(images, cache.categories), results, "bbox").AP
        for images in (as_written, as_stored)
    )
    said = f"box AP of {len(chosen)} of these images is {100 * after:.1f}, and"
    if before > IMPLAUSIBLE_BOX_AP and before > _CLEARLY_MORE * after:
        reporter.warn(
            f"{said} {100 * before:.1f} with annotations from before EXIF rotation: they were made "
            "without it. Remove the tag (exiftool -Orientation= FILES) and extract again"
        )
    elif after > IMPLAUSIBLE_BOX_AP and after > _CLEARLY_MORE * before:
        reporter.say(
            f"{said} {100 * before:.1f} with annotations from before EXIF rotation: all is right"
        )


def turned_boxes(
    boxes_xyxy: NDArray[np.float32], size_hw: tuple[int, int], orientation: int
) -> NDArray[np.float32]:
    """Boxes (G, 4), in pixels of an image as it is stored, after EXIF rotation (EXIF 2.3, tag 274).

    ``size_hw`` is the same before and after, ``orientation`` 1 to 8.
    """
    height, width = size_hw
    x, y = boxes_xyxy[:, [0, 2]], boxes_xyxy[:, [1, 3]]
    if orientation >= 5:
        x, y = y, x
    if orientation in (2, 3, 6, 7):
        x = width - x[:, ::-1]
    if orientation in (3, 4, 7, 8):
        y = height - y[:, ::-1]
    return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
