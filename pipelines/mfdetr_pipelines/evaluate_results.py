"""Evaluate a COCO results file of any tool: boxes and masks."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from mfdetr_cache.choices import Evaluator, Extra, OnBad
from mfdetr_cache.coco.annotations import CocoSplit, load_coco_split
from mfdetr_cache.coco.labelled import one_category
from mfdetr_cache.coco.results import load_results
from mfdetr_cache.errors import DatasetError
from mfdetr_cache.evaluation.coco_metrics import (
    CocoReport,
    Kind,
    Result,
    evaluate_results,
    ground_truth_of_split,
    measure_results,
    told_of_empty_images,
    told_of_no_mask,
)
from mfdetr_cache.evaluation.confusion import Confusion, confusions
from mfdetr_cache.reporter import Reporter, SilentReporter

# AP of results that perhaps are not what they seem; AP that tells of nothing found; how many times
# more it must be without categories.
_IMPLAUSIBLE_AP, _NOTHING, _CLEARLY_BETTER = 0.1, 0.01, 5

# From this share of the images on, results are perhaps of some images only.
_MANY_MISSED = 0.2

_NAMES: dict[Kind, str] = {"segm": "mask", "bbox": "box", "boundary": "boundary"}
_FIELDS: dict[Kind, str] = {"segm": "segmentation", "bbox": "bbox", "boundary": "segmentation"}


@dataclass(frozen=True, slots=True)
class ResultsSummary:
    """Metrics of a results file.

    Attributes:
        reports: By kind; kinds that the file does not have are absent.
        confusion: What objects are taken for; empty without masks, or if not requested.
    """

    num_images: int
    num_results: int
    reports: dict[Kind, CocoReport]
    confusion: tuple[Confusion, ...] = ()

    def metrics(self) -> dict[str, dict[str, float] | None]:
        """Metrics by kind, in [0, 1]; None for kinds that the file does not have."""
        return {
            name: self.reports[kind].metrics.to_dict() if kind in self.reports else None
            for kind, name in _NAMES.items()
        }

    def details(self) -> dict[str, Any]:
        """Recalls and per-category metrics, and the confusion."""
        found: dict[str, Any] = {
            _NAMES[kind]: report.details()
            for kind, report in self.reports.items()
            if kind != "boundary"
        }
        if self.confusion:
            found["confusion"] = [asdict(c) for c in self.confusion]
        return found


def run_evaluate_results(
    results: Path,
    annotations: Path,
    evaluator: Evaluator = "fast",
    reporter: Reporter | None = None,
    *,
    extras: Collection[Extra] = frozenset({"boundary"}),
    on_bad: OnBad = "stop",
) -> ResultsSummary:
    """Measure a COCO results file: ``bbox`` (xywh) and ``segmentation`` against instances JSON.

    ``extras`` may have ``boundary`` and ``confusion``. ``on_bad`` stops at, or leaves out,
    annotations and results that cannot be used. DatasetError if a file cannot be used or a result
    has an unknown image id.
    """
    reporter = reporter or SilentReporter()
    split = load_coco_split(annotations, on_bad=on_bad, needs="boxes")
    split.tell_faults(reporter)
    found = load_results(results, split, on_bad)
    found.faults.tell(reporter)
    truth = ground_truth_of_split(split)
    if told := told_of_empty_images(truth):
        reporter.warn(told)
    annotated = {a["image_id"] for a in truth.dataset["annotations"]}
    missed = annotated - {r["image_id"] for r in found.results}
    if found.results and len(missed) > _MANY_MISSED * len(annotated):
        reporter.warn(
            f"{results}: {len(missed)} of {len(annotated)} images with objects have no result, so "
            "all their objects count as missed; if only the others were looked at, pass "
            "annotations of these"
        )
    asked: dict[Kind, list[Result]] = {
        kind: found.with_field(field)
        for kind, field in _FIELDS.items()
        if kind != "boundary" or "boundary" in extras
    }
    if len(found.results):
        # A kind that no result has is not measured; an empty list is an AP of 0.
        asked = {kind: those for kind, those in asked.items() if those}
    asked = _without_masks_that_nobody_drew(truth, asked, reporter)
    for kind in ("segm", "bbox"):
        if kind in asked and (lacking := len(found.results) - len(asked[kind])):
            reporter.warn(
                f"{results}: {lacking} of {len(found.results)} results have no {_FIELDS[kind]}; "
                f"{_NAMES[kind]} AP is that of the others"
            )
    reports = {
        kind: measure_results(truth, those, kind, evaluator) for kind, those in asked.items()
    }
    _judge(results, split, asked, reports, reporter)
    wanted = asked.get("segm", []) if "confusion" in extras else []
    seen_as = confusions(truth, wanted) if wanted else ()
    return ResultsSummary(len(split.images), found.faults.total, reports, seen_as)


def _judge(
    file: Path,
    split: CocoSplit,
    asked: Mapping[Kind, list[Result]],
    reports: Mapping[Kind, CocoReport],
    reporter: Reporter,
) -> None:
    """Warn of an AP near zero that tells of ids or places rather than of a detector."""
    kind: Kind = "segm" if "segm" in reports else "bbox"
    if not asked.get(kind) or not 0 <= reports[kind].metrics.AP < _IMPLAUSIBLE_AP:
        return
    whole = one_category(split)
    alike = [{**r, "category_id": whole.categories[0].category_id} for r in asked[kind]]
    alone = evaluate_results(ground_truth_of_split(whole), alike, kind).AP
    said = f"{file}: {_NAMES[kind]} AP is {100 * reports[kind].metrics.AP:.1f}"
    if alone > _CLEARLY_BETTER * max(reports[kind].metrics.AP, _NOTHING):
        reporter.warn(
            f"{said}, but {100 * alone:.1f} where categories do not count: the category_id of "
            "results and annotations mean different categories, such as numbers from 0 and from 1"
        )
    elif alone < _NOTHING:
        reporter.warn(
            f"{said}, and no better where categories do not count: results are of other images, in "
            "another image size, or their numbers or runs are in another order"
        )


def _without_masks_that_nobody_drew(
    truth: COCO, asked: dict[Kind, list[Result]], reporter: Reporter
) -> dict[Kind, list[Result]]:
    """Only the box results if no annotation has a mask, else all; DatasetError if none are left."""
    told = told_of_no_mask(truth)
    if told is None or not asked.keys() - {"bbox"}:
        return asked
    if any("segmentation" in a for a in truth.dataset["annotations"]):
        reporter.warn(told)
        return asked
    boxes: dict[Kind, list[Result]] = {k: v for k, v in asked.items() if k == "bbox"}
    if not boxes:
        raise DatasetError(
            "the annotations have boxes only and the results masks only: nothing can be measured"
        )
    reporter.warn("the annotations have no masks: only boxes are measured")
    return boxes
