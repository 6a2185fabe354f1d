"""Confidence interval of a difference of two APs: a paired bootstrap over images."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mfdetr_cache.evaluation.coco_metrics import Result, loaded, plain_results, with_masks

_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class _CategoryMatches:
    """Detections of one category by falling score, matched at ten IoU thresholds."""

    image: NDArray[np.int64]  # (D,)
    hit: NDArray[np.bool_]  # (T, D)
    counted: NDArray[np.bool_]  # (T, D): not matched to a crowd
    objects: NDArray[np.int64]  # (images,): objects to be found in each image


class WeightedAP:
    """Mask AP of COCO results as a function of the multiplicity of each image."""

    def __init__(self, ground_truth: COCO, results: Sequence[Result]) -> None:
        ground_truth, plain = with_masks(ground_truth, plain_results(results, "segm"))
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(ground_truth, loaded(ground_truth, plain), "segm")
            evaluation.params.areaRng = evaluation.params.areaRng[:1]
            evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
            evaluation.evaluate()
        self.image_ids = tuple(int(i) for i in evaluation.params.imgIds)
        count = len(self.image_ids)
        matched = evaluation.evalImgs
        self._categories = [
            matches
            for start in range(0, len(matched), count)
            if (matches := _category(matched[start : start + count])) is not None
        ]

    def __call__(self, multiplicity: NDArray[np.float64]) -> float:
        """COCO's AP in [0, 1] for a multiplicity of each image; -1 without any object."""
        values = [v for c in self._categories if (v := _average(c, multiplicity)) is not None]
        return float(np.mean(values)) if values else -1.0


def _category(images: list[dict[str, NDArray[np.float64]] | None]) -> _CategoryMatches | None:
    found = [(number, matches) for number, matches in enumerate(images) if matches is not None]
    objects = np.zeros(len(images), dtype=np.int64)
    for number, matches in found:
        objects[number] = (np.asarray(matches["gtIgnore"]) == 0).sum()
    if not objects.any():
        return None
    order = np.argsort(-np.concatenate([m["dtScores"] for _, m in found]), kind="mergesort")
    return _CategoryMatches(
        np.concatenate([np.full(len(m["dtScores"]), number) for number, m in found])[order],
        np.concatenate([m["dtMatches"] for _, m in found], axis=1)[:, order] > 0,
        np.concatenate([m["dtIgnore"] for _, m in found], axis=1)[:, order] == 0,
        objects,
    )


def _average(matches: _CategoryMatches, multiplicity: NDArray[np.float64]) -> float | None:
    """Mean over thresholds of precision at 101 recalls, as COCOeval accumulates it."""
    total = float((matches.objects * multiplicity).sum())
    if total == 0:
        return None
    weight = multiplicity[matches.image] * matches.counted
    true = np.cumsum(weight * matches.hit, axis=1)
    false = np.cumsum(weight * ~matches.hit, axis=1)
    precision = true / np.maximum(true + false, np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    mean = 0.0
    for recall, values in zip(true / total, envelope, strict=True):
        place = np.searchsorted(recall, _RECALLS, side="left")
        inside = place < len(values)
        mean += float(values[place[inside]].sum()) / len(_RECALLS)
    return mean / len(precision)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The second of two APs minus the first, with the 95 % interval of it; all as shares of 1."""

    first: float
    second: float
    difference: float
    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        """In points, with the interval; ``~`` in front where it holds zero."""
        mark = "~ " if self.low <= 0 <= self.high else ""
        low, high = 100 * self.low, 100 * self.high
        return f"{mark}{100 * self.difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def differences_to_first(
    rows: Sequence[Sequence[WeightedAP]], samples: int
) -> list[PairedDifference]:
    """AP of each other row minus the first row's, with 95 % percentile intervals from paired draws.

    ``rows`` hold the results of each row, one per seed, all of the same images; else ValueError. A
    row's AP is the mean over its seeds: the interval covers other images, drawn ``samples`` times
    with replacement, not other seeds.
    """
    ids = rows[0][0].image_ids
    if any(ap.image_ids != ids for row in rows for ap in row):
        raise ValueError("a paired bootstrap needs results of the same images")
    random = np.random.default_rng(0)
    drawn = [np.ones(len(ids))]
    for _ in range(samples):
        picked = random.integers(0, len(ids), len(ids))
        drawn.append(np.bincount(picked, minlength=len(ids)).astype(np.float64))
    first, *others = np.array([[np.mean([ap(d) for ap in row]) for d in drawn] for row in rows])
    differences = []
    for values in others:
        moved = values - first
        low, high = np.percentile(moved[1:], (2.5, 97.5))
        differences.append(
            PairedDifference(
                float(first[0]), float(values[0]), float(moved[0]), float(low), float(high), samples
            )
        )
    return differences
