"""COCO average precision: by faster-coco-eval, with pycocotools as the referee."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO as FastCOCO
from faster_coco_eval import COCOeval_faster
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mfdetr_cache.choices import Evaluator
from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.ops.masks import compress_run_lengths
from mfdetr_cache.types import GroundTruth

Result = dict[str, Any]
Kind = Literal["bbox", "segm", "boundary"]


@dataclass(frozen=True, slots=True)
class CocoMetrics:
    """COCO's summary, each in [0, 1], or -1 where there is nothing to measure.

    Attributes:
        AP: Mean over IoU 0.50 to 0.95.
        AP50: At IoU 0.50.
        AP75: At IoU 0.75.
        APS: Objects smaller than 32 x 32 pixels.
        APM: Objects in between.
        APL: Objects of 96 x 96 pixels and more.
    """

    AP: float
    AP50: float
    AP75: float
    APS: float
    APM: float
    APL: float

    def to_dict(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)


_RECALLS = ("AR1", "AR10", "AR100", "ARS", "ARM", "ARL")


@dataclass(frozen=True, slots=True)
class CategoryMetrics:
    """One category's part of a report.

    Attributes:
        category_id: COCO id.
        name: Its name.
        objects: Annotated objects without crowds.
        AP: In [0, 1]; -1 without objects.
        AP50: At IoU 0.50.
    """

    category_id: int
    name: str
    objects: int
    AP: float
    AP50: float


@dataclass(frozen=True, slots=True)
class CocoReport:
    """Everything COCO's evaluation says about a list of results.

    Attributes:
        metrics: The summary.
        recall: ``AR1, AR10, AR100`` at so many detections an image, ``ARS, ARM, ARL`` by size.
        categories: One entry per category, by id.
    """

    metrics: CocoMetrics
    recall: dict[str, float]
    categories: tuple[CategoryMetrics, ...]

    def details(self) -> dict[str, Any]:
        """Recalls and categories as plain values."""
        return {"recall": self.recall, "categories": [asdict(c) for c in self.categories]}


def coco_ground_truth(
    images: Iterable[tuple[int, tuple[int, int], GroundTruth]], categories: Sequence[dict[str, Any]]
) -> COCO:
    """The ground truth of some images as pycocotools takes it.

    Args:
        images: Image id, height and width, objects.
        categories: ``{"id", "name"}`` of every category.

    Returns:
        An indexed ``COCO``.
    """
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, size_hw, objects in images:
        listed.append({"id": image_id, "height": size_hw[0], "width": size_hw[1]})
        for index in range(len(objects)):
            x0, y0, x1, y1 = (float(v) for v in objects.boxes_xyxy[index])
            annotations.append(
                {
                    "id": int(objects.annotation_ids[index]),
                    "image_id": image_id,
                    "category_id": int(objects.category_ids[index]),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(objects.areas[index]),
                    "iscrowd": int(objects.is_crowd[index]),
                    "segmentation": compress_run_lengths(objects.run_lengths[index], size_hw),
                }
            )
    coco = COCO()
    coco.dataset = {"images": listed, "annotations": annotations, "categories": list(categories)}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def evaluate_results(
    ground_truth: COCO, results: Sequence[Result], kind: Kind, evaluator: Evaluator = "fast"
) -> CocoMetrics:
    """COCO metrics of a list of results.

    Args:
        ground_truth: From :func:`coco_ground_truth`.
        results: COCO results with ``image_id``, ``category_id``, ``score`` and ``bbox`` (xywh) or
            ``segmentation`` (RLE).
        kind: Boxes, masks, or boundaries of masks.
        evaluator: Who computes.

    Returns:
        The summary; all zero when there is no result.
    """
    return measure_results(ground_truth, results, kind, evaluator).metrics


def measure_results(
    ground_truth: COCO, results: Sequence[Result], kind: Kind, evaluator: Evaluator = "fast"
) -> CocoReport:
    """COCO metrics, recalls and the APs of the categories.

    Boundary AP (Cheng et al., 2021) takes the smaller of mask IoU and boundary IoU, the boundary
    being 2 % of the image's diagonal wide.

    Args:
        ground_truth: From :func:`coco_ground_truth`.
        results: COCO results with ``image_id``, ``category_id``, ``score`` and ``bbox`` (xywh) or
            ``segmentation`` (RLE).
        kind: Boxes, masks, or boundaries of masks.
        evaluator: Who computes; boundaries are always measured by faster-coco-eval, as pycocotools
            knows none.

    Returns:
        The report; all zero when there is no result.
    """
    objects = [a for a in ground_truth.dataset["annotations"] if not a.get("iscrowd", 0)]
    counts = Counter(int(a["category_id"]) for a in objects)
    names = category_names(ground_truth.dataset["categories"])
    if not results:
        nothing = tuple(
            CategoryMetrics(c, n, counts[c], 0.0 if counts[c] else -1.0, 0.0 if counts[c] else -1.0)
            for c, n in sorted(names.items())
        )
        zeros = CocoMetrics(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        return CocoReport(zeros, dict.fromkeys(_RECALLS, 0.0), nothing)
    # loadRes adds fields to what it is given, and takes a box for a polygon when both are there.
    wanted = "bbox" if kind == "bbox" else "segmentation"
    fields = ("image_id", "category_id", "score", wanted)
    plain = [{key: result[key] for key in fields} for result in results]
    evaluation = _evaluation(ground_truth, plain, kind, evaluator)
    stats = [float(v) for v in evaluation.stats[:12]]
    precision = np.asarray(evaluation.eval["precision"])[..., 0, -1]  # (T, R, K): all areas, 100
    categories = tuple(
        CategoryMetrics(
            category_id=int(c),
            name=names[int(c)],
            objects=counts[int(c)],
            AP=_mean_of_valid(precision[:, :, k]),
            AP50=_mean_of_valid(precision[0, :, k]),
        )
        for k, c in enumerate(evaluation.params.catIds)
    )
    return CocoReport(
        CocoMetrics(*stats[:6]), dict(zip(_RECALLS, stats[6:], strict=True)), categories
    )


def _evaluation(ground_truth: COCO, plain: list[Result], kind: Kind, evaluator: Evaluator) -> Any:  # noqa: ANN401
    """An evaluation that has been run, of either library; both have the same interface."""
    with contextlib.redirect_stdout(io.StringIO()):
        if evaluator == "pycocotools" and kind != "boundary":
            evaluation = COCOeval(ground_truth, ground_truth.loadRes(plain), kind)
        else:
            # It adds fields to annotations; ours are used again.
            document = dict(ground_truth.dataset)
            document["annotations"] = [dict(a) for a in document["annotations"]]
            truth = FastCOCO(document)
            evaluation = COCOeval_faster(
                truth, truth.loadRes(plain), kind, print_function=lambda *_: None
            )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _mean_of_valid(precision: NDArray[np.float64]) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if len(valid) else -1.0
