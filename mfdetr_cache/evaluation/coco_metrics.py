"""COCO average precision by faster-coco-eval, or by pycocotools as the reference."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO as FastCOCO
from faster_coco_eval import COCOeval_faster
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mfdetr_cache.choices import Evaluator
from mfdetr_cache.coco.annotations import CocoSplit
from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.coco.image_list import ImageEntry
from mfdetr_cache.ops.masks import RunLengths, compress_run_lengths
from mfdetr_cache.types import GroundTruth

Result = dict[str, Any]
Kind = Literal["bbox", "segm", "boundary"]


@dataclass(frozen=True, slots=True)
class CocoMetrics:
    """COCO's summary, each in [0, 1], or -1 where there is nothing to measure.

    Over IoU 0.50 to 0.95, at IoU 0.50 and 0.75; of objects smaller than 32 x 32 pixels, in between,
    and of 96 x 96 pixels and more.
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
    """AP of one category in [0, 1], -1 without objects; crowds do not count as objects."""

    category_id: int
    name: str
    objects: int
    AP: float
    AP50: float


@dataclass(frozen=True, slots=True)
class CocoReport:
    """COCO's evaluation of a list of results, with categories by id.

    Recalls are ``AR1, AR10, AR100`` by detections per image, ``ARS, ARM, ARL`` by size.
    """

    metrics: CocoMetrics
    recall: dict[str, float]
    categories: tuple[CategoryMetrics, ...]

    def details(self) -> dict[str, Any]:
        """Recalls and categories as plain values."""
        return {"recall": self.recall, "categories": [asdict(c) for c in self.categories]}


# The part of images without an object from which on it is told; 1 % in COCO.
_MANY_EMPTY = 0.25

# Category id, box in xywh, area, whether it is a crowd, and run lengths, none of them for no mask.
_Object = tuple[int, list[float], float, bool, RunLengths]


def coco_ground_truth(
    images: Iterable[tuple[int, tuple[int, int], GroundTruth]], categories: Sequence[dict[str, Any]]
) -> COCO:
    """The ground truth of images, by id, height and width, and objects, as an indexed ``COCO``."""

    def objects_of(truth: GroundTruth) -> Iterator[_Object]:
        boxes_xywh = truth.boxes_xyxy.astype(np.float64)
        boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
        columns = (truth.category_ids, boxes_xywh, truth.areas, truth.is_crowd)
        return zip(*(column.tolist() for column in columns), truth.run_lengths, strict=True)

    return _coco(((i, size_hw, objects_of(g)) for i, size_hw, g in images), list(categories))


def ground_truth_of_split(split: CocoSplit) -> COCO:
    """The ground truth of an annotation file as an indexed ``COCO``, boxes in double precision."""

    def objects_of(entry: ImageEntry) -> Iterator[_Object]:
        for a in split.annotations[entry.image_id]:
            yield a.category_id, list(a.box_xywh), a.area, a.is_crowd, a.run_lengths

    images = ((e.image_id, e.size_hw, objects_of(e)) for e in split.images)
    return _coco(images, split.plain_categories)


def _coco(
    images: Iterable[tuple[int, tuple[int, int], Iterable[_Object]]], categories: list[Any]
) -> COCO:
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, size_hw, objects in images:
        listed.append({"id": image_id, "height": size_hw[0], "width": size_hw[1]})
        for category_id, box_xywh, area, is_crowd, runs in objects:
            annotation: dict[str, Any] = {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box_xywh,
                "area": area,
                "iscrowd": int(is_crowd),
            }
            if len(runs):
                annotation["segmentation"] = compress_run_lengths(runs, size_hw)
            annotations.append(annotation)
    return _indexed(listed, annotations, categories)


def _indexed(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: list[Any]
) -> COCO:
    # Evaluators mark what is matched by the id of the annotation, and 0 or less is "not matched".
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def evaluate_results(ground_truth: COCO, results: Sequence[Result], kind: Kind) -> CocoMetrics:
    """The summary of :func:`measure_results`."""
    return measure_results(ground_truth, results, kind).metrics


def measure_results(
    ground_truth: COCO, results: Sequence[Result], kind: Kind, evaluator: Evaluator = "fast"
) -> CocoReport:
    """COCO metrics, recalls and the APs of the categories.

    Results have ``image_id``, ``category_id``, ``score`` and ``bbox`` (xywh) or ``segmentation``
    (RLE). Boundary AP (Cheng et al., 2021) takes the smaller of mask IoU and boundary IoU, the
    boundary being 2 % of the image's diagonal wide; it is always faster-coco-eval's, as pycocotools
    has none. Objects without a mask do not count for masks, nor do images on which none has one.
    Without a result everything is 0 where there is an object, else -1.
    """
    plain = plain_results(results, kind)
    if kind != "bbox":
        ground_truth, plain = with_masks(ground_truth, plain)
    objects = [a for a in ground_truth.dataset["annotations"] if not a["iscrowd"]]
    counts = Counter(int(a["category_id"]) for a in objects)
    names = category_names(ground_truth.dataset["categories"])
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


def plain_results(results: Sequence[Result], kind: Kind) -> list[Result]:
    """Copies with what pycocotools' ``loadRes`` needs alone.

    It adds fields to what it is given, and takes a box for a polygon when both are there.
    """
    fields = ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
    return [{key: result[key] for key in fields} for result in results]


def with_masks(ground_truth: COCO, plain: list[Result]) -> tuple[COCO, list[Result]]:
    """What masks are measured on: no object that has a box only, and no image without a mask drawn.

    An image is left out, with its results, where it has objects and all of them have boxes only:
    its masks are not drawn yet, and what is found there is not wrong. One without any object stays,
    and so do all where nobody drew anything, which has no AP.
    """
    document = ground_truth.dataset
    kept = [dict(a) for a in document["annotations"] if "segmentation" in a]
    if len(kept) == len(document["annotations"]):
        return ground_truth, plain
    undrawn = _undrawn_images(ground_truth)
    images = [i for i in document["images"] if i["id"] not in undrawn]
    plain = [r for r in plain if r["image_id"] not in undrawn]
    return _indexed(images, kept, document["categories"]), plain


def told_of_no_mask(ground_truth: COCO) -> str | None:
    """What mask AP leaves out, in a line; None where every object has a mask."""
    annotations = ground_truth.dataset["annotations"]
    without = [a["image_id"] for a in annotations if "segmentation" not in a]
    if not without:
        return None
    if len(without) == len(annotations):
        return "no object has a mask, so there is no mask AP"
    undrawn = _undrawn_images(ground_truth)
    said = f"{len(without)} of {len(annotations)} objects have no mask and do not count for mask AP"
    if undrawn:
        said += (
            f"; {len(undrawn)} of {len(ground_truth.imgs)} images have boxes only and are left out"
        )
    if stray := sum(i not in undrawn for i in without):
        said += f"; what is found of {stray} of the objects, on other images, counts as wrong"
    return said


def told_of_empty_images(ground_truth: COCO) -> str | None:
    """A line where so many images have no object that perhaps nobody annotated them yet."""
    annotations = ground_truth.dataset["annotations"]
    images = len(ground_truth.imgs)
    empty = images - len({a["image_id"] for a in annotations})
    if not annotations or empty <= _MANY_EMPTY * images:
        return None
    return (
        f"{empty} of {images} images have no object, and what is found on them counts as wrong; if "
        "they are not annotated yet, measure without them"
    )


def _undrawn_images(ground_truth: COCO) -> set[int]:
    """Images that have boxes only, unless nobody drew a mask on any."""
    annotations = ground_truth.dataset["annotations"]
    drawn = {a["image_id"] for a in annotations if "segmentation" in a}
    return {a["image_id"] for a in annotations} - drawn if drawn else set()


def _evaluation(ground_truth: COCO, plain: list[Result], kind: Kind, evaluator: Evaluator) -> Any:  # noqa: ANN401
    """An evaluation that has been run, of either library; both have the same interface."""
    with contextlib.redirect_stdout(io.StringIO()):
        if evaluator == "pycocotools" and kind != "boundary":
            evaluation = COCOeval(ground_truth, loaded(ground_truth, plain), kind)
        else:
            # It adds fields to annotations; ours are used again.
            document = dict(ground_truth.dataset)
            document["annotations"] = [dict(a) for a in document["annotations"]]
            truth = FastCOCO(document)
            evaluation = COCOeval_faster(
                truth, loaded(truth, plain), kind, print_function=lambda *_: None
            )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def loaded(ground_truth: Any, plain: list[Result]) -> Any:  # noqa: ANN401
    """Plain results as the evaluators of either library take them."""
    if plain:
        return ground_truth.loadRes(plain)
    # It fails on an empty list.
    nothing = type(ground_truth)()
    nothing.dataset = {"images": [], "annotations": [], "categories": []}
    nothing.createIndex()
    return nothing


def _mean_of_valid(precision: NDArray[np.float64]) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if len(valid) else -1.0
