"""Which categories are taken for which others."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO

from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.evaluation.baselines import SAME_OBJECT_IOU
from mfdetr_cache.evaluation.coco_metrics import Result
from mfdetr_cache.ops.masks import rle_iou


@dataclass(frozen=True, slots=True)
class Confusion:
    """How many objects of a category were found as what; ``found_as`` is None for not at all."""

    category: str
    found_as: str | None
    objects: int


def confusions(truth: COCO, results: Sequence[Result]) -> tuple[Confusion, ...]:
    """What the annotated objects were found as, the most frequent first.

    An object is found as the category of the most confident result whose mask overlaps it by an IoU
    of 0.5 or more. Crowds and objects without a mask do not count. Results have a ``segmentation``
    (RLE).
    """
    of_image: dict[int, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda r: -float(r["score"])):
        of_image[result["image_id"]].append(result)
    counts: Counter[tuple[int, int | None]] = Counter()
    for image_id, annotations in truth.imgToAnns.items():
        objects = [a for a in annotations if not a["iscrowd"] and "segmentation" in a]
        found = of_image[image_id]
        masks = [[one["segmentation"] for one in those] for those in (found, objects)]
        for annotated, overlap in zip(objects, rle_iou(*masks).T, strict=True):
            first = next(iter(np.flatnonzero(overlap >= SAME_OBJECT_IOU)), None)
            seen_as = None if first is None else int(found[first]["category_id"])
            counts[int(annotated["category_id"]), seen_as] += 1
    names = category_names(truth.dataset["categories"])
    return tuple(
        Confusion(
            names[annotated], None if seen_as is None else names.get(seen_as, str(seen_as)), count
        )
        for (annotated, seen_as), count in counts.most_common()
    )
