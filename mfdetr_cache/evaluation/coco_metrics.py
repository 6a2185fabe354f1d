"""COCO average precision, computed by pycocotools."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mfdetr_cache.masks import compress_run_lengths
from mfdetr_cache.types import GroundTruth

Result = dict[str, Any]


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
    ground_truth: COCO, results: Sequence[Result], kind: Literal["bbox", "segm"]
) -> CocoMetrics:
    """COCO metrics of a list of results.

    Args:
        ground_truth: From :func:`coco_ground_truth`.
        results: COCO results with ``image_id``, ``category_id``, ``score`` and ``bbox`` (xywh) or
            ``segmentation`` (RLE).
        kind: Boxes or masks.

    Returns:
        The summary; all zero when there is no result.
    """
    if not results:
        return CocoMetrics(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    # loadRes adds fields to what it is given, and takes a box for a polygon when both are there.
    wanted = "bbox" if kind == "bbox" else "segmentation"
    fields = ("image_id", "category_id", "score", wanted)
    plain = [{key: result[key] for key in fields} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(plain), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return CocoMetrics(*(float(v) for v in evaluation.stats[:6]))
