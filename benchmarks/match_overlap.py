"""How well the boxes that a Hungarian matching trains on fit their objects.

python benchmarks/match_overlap.py CACHE
"""

import sys

import numpy as np

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.matching.matchers import match_one_to_one
from mfdetr_cache.matching.objects import trainable_objects


def main(location: str) -> None:
    cache = FeatureCache.open(location)
    found = []
    for row in cache.rows:
        image = cache.read(row, ())
        truth, objects = image.ground_truth, trainable_objects(image.ground_truth)
        height, width = image.geometry.original_hw
        boxes = truth.boxes_xyxy[objects] / np.array([width, height, width, height], np.float32)
        if len(objects):
            labels = truth.labels[objects]
            logits, predicted = image.class_logits, image.boxes_cxcywh_norm
            found.append(match_one_to_one(logits, predicted, labels, boxes).iou)
    iou = np.concatenate(found)
    print(f"{len(iou)} matches, mean IoU {iou.mean():.3f}")
    for least in (0.25, 0.5, 0.75):
        print(f"below {least}: {100 * (iou < least).mean():.1f} %")


if __name__ == "__main__":
    main(sys.argv[1])
