"""Masks for the detections of an image, from its cached maps and a trained head."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.choices import Scoring
from mfdetr_cache.errors import HeadError
from mfdetr_cache.evaluation.detections import Detections, detections_of, select_detections
from mfdetr_cache.evaluation.scoring import mask_confidence, mask_iou_confidence
from mfdetr_cache.head.batch import HeadBatch, MapGroup, QueryContext, live_groups, map_groups
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.ops.boxes import cxcywh_to_xyxy, scale_boxes
from mfdetr_cache.ops.masks import compress_run_lengths
from mfdetr_cache.ops.masks_pasting import run_lengths_in_box
from mfdetr_cache.types import CachedImage, DetectorOutput, DetectorSpec, ImageGeometry


@dataclass(frozen=True, slots=True)
class MaskPrediction:
    """Detections of one image with their masks. A query's mask is computed once.

    Attributes:
        detections: By falling class score.
        confidences: Final score s_i of each detection, float64, shape (D,).
        mask_index: Index of each detection's mask among the M masks, int64, shape (D,).
        mask_probs: Mask of each distinct query over its box, shape (M, r, r).
        boxes_xyxy: Box of each distinct query in original image pixels, shape (M, 4).
    """

    detections: Detections
    confidences: NDArray[np.float64]
    mask_index: Tensor
    mask_probs: Tensor
    boxes_xyxy: Tensor


def predict_masks(
    head: MaskHead,
    image: CachedImage,
    spec: DetectorSpec,
    device: torch.device,
    scoring: Scoring = "auto",
    threshold: float = 0.0,
) -> MaskPrediction:
    """Run a head, in evaluation mode, on a cached image.

    Detections below ``threshold`` are left out before the head runs: no scoring gives a mask more
    than its class score.

    HeadError if Eq. 13 is requested by ``scoring`` and the head predicts no IoU.
    """
    groups = map_groups([image], head.map_names, device)
    detections = detections_of(image, spec)
    boxes, queries = (
        torch.from_numpy(np.array(values)) for values in (image.boxes_cxcywh_norm, image.queries)
    )
    return _predict(
        head, groups, detections, boxes, queries.float(), image.geometry, scoring, threshold
    )


def predict_live(
    head: MaskHead,
    output: DetectorOutput,
    geometry: ImageGeometry,
    spec: DetectorSpec,
    scoring: Scoring = "auto",
    threshold: float = 0.0,
) -> MaskPrediction:
    """:func:`predict_masks` for what a live detector gives for one image, on the head's device."""
    groups = live_groups([output], [geometry], head.map_names)
    logits, boxes = output.class_logits[0].cpu(), output.boxes_cxcywh_norm[0].cpu()
    detections = select_detections(logits, boxes, geometry.original_hw, spec)
    queries = output.queries[0]
    return _predict(head, groups, detections, boxes, queries, geometry, scoring, threshold)


@torch.no_grad()
def _predict(
    head: MaskHead,
    groups: tuple[MapGroup, ...],
    detections: Detections,
    boxes_cxcywh_norm: Tensor,
    queries: Tensor,
    geometry: ImageGeometry,
    scoring: Scoring,
    threshold: float,
) -> MaskPrediction:
    device = next(iter(groups[0].maps.values())).device
    queries = queries.to(device)
    detected = detections.query_index.unique().to(device)
    # In double precision, as the final scores are compared.
    kept = detections.subset(detections.class_scores.double() >= threshold)
    # Through stages of refinement queries look at one another: all take part.
    asked = detections if head.config.mask_predictor == "refined" else kept
    regions = asked.query_index.unique()
    corners = cxcywh_to_xyxy(boxes_cxcywh_norm)[regions]
    context = None
    if len(regions) < len(detected):
        # Eq. 10 lets every query look at all that were detected, those below the threshold too.
        image_of_each = torch.zeros(len(detected), dtype=torch.long, device=device)
        context = QueryContext(queries[detected], image_of_each)
    batch = HeadBatch(
        groups=groups,
        queries=queries[regions.to(device)],
        boxes_xyxy=scale_boxes(corners, geometry.resized_hw),
        image_index=torch.zeros(len(regions), dtype=torch.long, device=device),
        counts=(len(regions),),
        context=context,
    )
    output = head(batch)
    probs = output.mask_logits.float().sigmoid().cpu()
    of_kept, position = kept.query_index.unique(return_inverse=True)
    if output.stages:
        # These boxes are the head's own.
        height, width = geometry.resized_hw
        shown = torch.searchsorted(regions, of_kept)
        refined = output.stages[-1].boxes_xyxy.float().cpu()[shown]
        corners = refined / refined.new_tensor([width, height, width, height])
        in_image = scale_boxes(corners, geometry.original_hw)[position]
        kept, probs = replace(kept, boxes_xyxy=in_image), probs[shown]
    if scoring == "auto":
        scoring = "mean" if output.mask_iou is None else "iou"
    confidences = kept.class_scores
    if scoring == "mean":
        confidences = mask_confidence(kept.class_scores, probs[position])
    elif scoring == "iou":
        if output.mask_iou is None:
            raise HeadError("this head predicts no mask IoU; score by mean or class instead")
        iou = output.mask_iou.float().cpu()
        # A class-agnostic head has one for all labels.
        column = kept.labels if iou.shape[1] > 1 else torch.zeros_like(kept.labels)
        iou = iou[position, column]
        confidences = mask_iou_confidence(kept.class_scores, iou)
    if not head.config.roialign:
        # These masks lie over the whole input.
        corners = corners.new_tensor(geometry.input_xyxy_norm).expand_as(corners)
    original = scale_boxes(corners, geometry.original_hw)
    return MaskPrediction(kept, confidences.double().numpy(), position, probs, original)


def masks_in_image(
    prediction: MaskPrediction, original_hw: tuple[int, int]
) -> list[dict[str, Any]]:
    """Compressed COCO RLE of every detection at the original size, without a bitmap.

    Detections of one query share theirs.
    """
    probs = prediction.mask_probs.numpy()
    boxes = prediction.boxes_xyxy.double().numpy()
    rles = [
        compress_run_lengths(run_lengths_in_box(mask, box, original_hw), original_hw)
        for mask, box in zip(probs, boxes, strict=True)
    ]
    return [rles[int(i)] for i in prediction.mask_index]
