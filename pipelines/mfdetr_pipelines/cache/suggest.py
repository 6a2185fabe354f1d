"""Cache suggest: the images whose masks are most worth drawing next."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.errors import DatasetError
from mfdetr_cache.evaluation.inference import MaskPrediction, predict_masks
from mfdetr_cache.evaluation.measure import images_of, open_with_head
from mfdetr_cache.evaluation.scoring import expected_iou
from mfdetr_cache.ops.devices import keep_freed_memory, torch_device
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.config.cache import SuggestConfig


@dataclass(frozen=True, slots=True)
class SuggestedImage:
    """An image whose masks are worth drawing.

    Attributes:
        uncertainty: Mean over its objects of 1 minus the expected IoU of their masks.
        objects: Confident objects on it by name of the category.
    """

    image_id: int
    file_name: str
    uncertainty: float
    objects: dict[str, int]


@dataclass(frozen=True, slots=True)
class SuggestSummary:
    """The images to draw, the most worthwhile first.

    Attributes:
        without_objects: How many of them have no confident object.
        drawn: Images of the cache that have all their masks, and were not looked at.
    """

    images: tuple[SuggestedImage, ...]
    looked_at: int
    without_objects: int
    drawn: int


@dataclass(frozen=True, slots=True)
class _Objects:
    """Confident objects of an image: 1 minus the expected IoU of their masks, class scores."""

    row: int
    uncertainty: NDArray[np.float64]
    scores: NDArray[np.float64]
    categories: NDArray[np.int64]


def run_suggest(config: SuggestConfig, reporter: Reporter) -> SuggestSummary:
    """Rank the images of a cache that lack masks by what drawing them is worth to a head.

    CacheError (missing, unfinished, damaged, or C1 as crops), HeadError, IdentityError (head and
    cache come from different detectors) or DatasetError (nothing to suggest).
    """
    cache, folder = open_with_head(config.cache, config.head)
    if folder.head.c1 is not None:
        cache.require_c1_map("a head that looks at whole images")
    device = torch_device(config.device)
    keep_freed_memory()
    head = folder.head.to(device)
    lacking, masks = _lacking_masks(cache)
    rows = lacking or cache.rows
    if not lacking:
        reporter.warn(
            f"every image of {cache.path} has its masks: all are ranked, as if to draw them again"
        )
    uncertain: list[_Objects] = []
    reporter.start("look at masks", len(rows), "images")
    for image in images_of(cache, rows, head.map_names):
        prediction = predict_masks(head, image, cache.spec, device, "class")
        objects = _confident(prediction, image.row, cache.label_categories, config.threshold)
        if len(objects.categories):
            uncertain.append(objects)
        reporter.advance()
    reporter.finish()
    if not uncertain:
        raise DatasetError(
            f"none of the {len(rows)} images that lack masks has an object of a class score from "
            f"{config.threshold:g} on; lower --threshold"
        )
    names = category_names(cache.categories)
    chosen = [uncertain[i] for i in most_worthwhile(uncertain, masks, config.count)]
    return SuggestSummary(
        images=tuple(
            SuggestedImage(
                cache.image_id(o.row),
                cache.file_name(o.row),
                float(o.uncertainty.mean()),
                dict(Counter(names[int(c)] for c in o.categories).most_common()),
            )
            for o in chosen
        ),
        looked_at=len(rows),
        without_objects=len(rows) - len(uncertain),
        drawn=len(cache) - len(rows),
    )


def _lacking_masks(cache: FeatureCache) -> tuple[tuple[int, ...], Counter[int]]:
    """Rows with a box that has no mask, or with nothing; and the masks there are by category."""
    lacking, masks = [], Counter[int]()
    for row in cache.rows:
        truth = cache.ground_truth(row)
        wanted = ~truth.is_crowd
        if not len(truth) or (wanted & ~truth.has_mask).any():
            lacking.append(row)
        masks.update(truth.category_ids[wanted & truth.has_mask].tolist())
    return tuple(lacking), masks


def _confident(
    prediction: MaskPrediction, row: int, label_categories: Sequence[int], threshold: float
) -> _Objects:
    """The best label of every query, where it has a category and a score above the threshold."""
    detections = prediction.detections
    categories = np.array(label_categories)[detections.labels.numpy()]
    scores = detections.class_scores.double().numpy()
    usable = (scores >= threshold) & (categories >= 0)
    # Detections fall in score, so the first of a mask has its best label.
    masks, first = np.unique(prediction.mask_index.numpy()[usable], return_index=True)
    uncertainty = 1 - expected_iou(prediction.mask_probs[torch.from_numpy(masks)].double()).numpy()
    return _Objects(row, uncertainty, scores[usable][first], categories[usable][first])


def most_worthwhile(candidates: Sequence[_Objects], masks: Counter[int], count: int) -> list[int]:
    """Indices of the images to draw, one after the other.

    Each time the image with the largest sum over its objects of
    class score * (1 - expected IoU) / sqrt(1 + n) is taken, n being the masks of the object's
    category that are there or in images taken before: a category counts the less the more of it
    there is, as in the sampling of LVIS. The class score stands for the chance that there is an
    object to draw.
    """
    images = np.repeat(np.arange(len(candidates)), [len(o.categories) for o in candidates])
    names, categories = np.unique(
        np.concatenate([o.categories for o in candidates]), return_inverse=True
    )
    gains = np.concatenate([o.scores * o.uncertainty for o in candidates])
    there = np.array([masks[int(c)] for c in names], dtype=np.float64)
    left = np.ones(len(candidates), dtype=bool)
    chosen: list[int] = []
    while len(chosen) < min(count, len(candidates)):
        worth = np.bincount(images, gains / np.sqrt(1 + there[categories]), len(candidates))
        best = int(np.where(left, worth, -1).argmax())
        chosen.append(best)
        left[best] = False
        there += np.bincount(categories[images == best], minlength=len(there))
    return chosen
