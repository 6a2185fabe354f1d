"""Evaluate a COCO results file of any tool with the same code: boxes and masks."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from mfdetr_cache.choices import Evaluator
from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.errors import DatasetError
from mfdetr_cache.evaluation.coco_metrics import (
    CocoMetrics,
    CocoReport,
    Kind,
    Result,
    measure_results,
)

_FIELDS: dict[Kind, str] = {"segm": "segmentation", "bbox": "bbox", "boundary": "segmentation"}


@dataclass(frozen=True, slots=True)
class ResultsSummary:
    """Metrics of a results file.

    Attributes:
        num_images: Images in the annotation file.
        num_results: Detections in the results file.
        reports: What was measured; what the file does not have is absent.
    """

    num_images: int
    num_results: int
    reports: dict[Kind, CocoReport]

    @property
    def mask(self) -> CocoMetrics | None:
        """Mask AP; None where the results have no masks."""
        return self._metrics("segm")

    @property
    def box(self) -> CocoMetrics | None:
        """Box AP; None where they have no boxes."""
        return self._metrics("bbox")

    @property
    def boundary(self) -> CocoMetrics | None:
        """Boundary AP; None where it was not asked for or there are no masks."""
        return self._metrics("boundary")

    def metrics(self) -> dict[str, dict[str, float] | None]:
        """All sets of metrics by name, in [0, 1]; None for what the file does not have."""
        found = {"mask": self.mask, "box": self.box, "boundary": self.boundary}
        return {name: None if m is None else m.to_dict() for name, m in found.items()}

    def details(self) -> dict[str, Any]:
        """Recalls and categories of masks and boxes."""
        names: dict[Kind, str] = {"segm": "mask", "bbox": "box"}
        return {n: self.reports[k].details() for k, n in names.items() if k in self.reports}

    def _metrics(self, kind: Kind) -> CocoMetrics | None:
        return self.reports[kind].metrics if kind in self.reports else None


def run_evaluate_results(
    results: Path, annotations: Path, evaluator: Evaluator = "fast", *, boundary: bool = True
) -> ResultsSummary:
    """Measure a results file.

    Args:
        results: COCO results: a list of ``image_id``, ``category_id``, ``score``, and ``bbox``
            (xywh) or ``segmentation`` (RLE).
        annotations: COCO instances JSON of the same images.
        evaluator: Who computes.
        boundary: Measure boundary AP too.

    Returns:
        Its metrics.

    Raises:
        DatasetError: If a file cannot be used, or a result speaks of an unknown image.
    """
    split = load_coco_split(annotations)
    found = _load_results(results)
    known = {entry.image_id for entry in split.images}
    for number, result in enumerate(found):
        if result["image_id"] not in known:
            raise DatasetError(
                f"{results}: result {number} is of image {result['image_id']}, which is not in "
                f"{annotations}"
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
    reports: dict[Kind, CocoReport] = {}
    for kind, field in _FIELDS.items():
        asked = kind != "boundary" or boundary
        if asked and all(field in r for r in found):
            reports[kind] = measure_results(truth, found, kind, evaluator)
    if not reports:
        raise DatasetError(f"{results}: its results have neither segmentation nor bbox throughout")
    return ResultsSummary(len(split.images), len(found), reports)


def _load_results(path: Path) -> list[Result]:
    if not path.is_file():
        raise DatasetError(f"results file {path} does not exist; check --results")
    try:
        document: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise DatasetError(f"results file {path} is not JSON ({error})") from error
    if not isinstance(document, list) or not document:
        raise DatasetError(f"results file {path} holds no list of results")
    for number, result in enumerate(document):
        for field in ("image_id", "category_id", "score"):
            if not isinstance(result, dict) or not isinstance(result.get(field), (int, float)):
                raise DatasetError(f"{path}: result {number} has no number {field!r}")
    return document
