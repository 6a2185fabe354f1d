"""Evaluate a COCO results file of any tool with the same code: boxes and masks."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.errors import DatasetError
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics, Result, evaluate_results


@dataclass(frozen=True, slots=True)
class ResultsSummary:
    """Metrics of a results file.

    Attributes:
        num_images: Images in the annotation file.
        num_results: Detections in the results file.
        mask: Mask AP; None where the results have no masks.
        box: Box AP; None where they have no boxes.
    """

    num_images: int
    num_results: int
    mask: CocoMetrics | None
    box: CocoMetrics | None

    def metrics(self) -> dict[str, dict[str, float] | None]:
        """Both sets of metrics by name, in [0, 1]; None for what the file does not have."""
        return {
            "mask": None if self.mask is None else self.mask.to_dict(),
            "box": None if self.box is None else self.box.to_dict(),
        }


def run_evaluate_results(results: Path, annotations: Path) -> ResultsSummary:
    """Measure a results file.

    Args:
        results: COCO results: a list of ``image_id``, ``category_id``, ``score``, and ``bbox``
            (xywh) or ``segmentation`` (RLE).
        annotations: COCO instances JSON of the same images.

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
    kinds = {"segmentation": "segm", "bbox": "bbox"}
    measured: dict[str, CocoMetrics | None] = {}
    for field, kind in kinds.items():
        has = bool(found) and all(field in r for r in found)
        measured[kind] = evaluate_results(truth, found, kind) if has else None  # type: ignore[arg-type]
    if not any(measured.values()):
        raise DatasetError(f"{results}: its results have neither segmentation nor bbox throughout")
    return ResultsSummary(len(split.images), len(found), measured["segm"], measured["bbox"])


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
