"""Masks for the detections of an image, from its cached maps and a trained head."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.choices import Scoring
from mfdetr_cache.errors import HeadError
from mfdetr_cache.evaluation.detections import Detections, detections_of
from mfdetr_cache.evaluation.scoring import mask_confidence, mask_iou_confidence
from mfdetr_cache.head.batch import HeadBatch, map_groups
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.ops.boxes import cxcywh_to_xyxy, scale_boxes
from mfdetr_cache.ops.masks import compress_run_lengths
from mfdetr_cache.ops.masks_pasting import run_lengths_in_box
from mfdetr_cache.types import CachedImage, DetectorSpec


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


@torch.no_grad()
def predict_masks(
    head: MaskHead,
    image: CachedImage,
    spec: DetectorSpec,
    device: torch.device,
    scoring: Scoring = "auto",
) -> MaskPrediction:
    """Run a head, in evaluation mode, on a cached or live image.

    HeadError if Eq. 13 is requested by ``scoring`` and the head predicts no IoU.
    """
    boxes = torch.from_numpy(np.array(image.boxes_cxcywh_norm))
    detections = detections_of(image, spec)
    queries, position = detections.query_index.unique(return_inverse=True)
    corners = cxcywh_to_xyxy(boxes)[queries]
    batch = HeadBatch(
        groups=map_groups([image], head.map_names, device),
        queries=torch.from_numpy(image.queries[queries.numpy()].astype(np.float32)).to(device),
        boxes_xyxy=scale_boxes(corners, image.geometry.resized_hw),
        image_index=torch.zeros(len(queries), dtype=torch.long, device=device),
        counts=(len(queries),),
    )
    output = head(batch)
    probs = output.mask_logits.float().sigmoid().cpu()
    if scoring == "auto":
        scoring = "mean" if output.mask_iou is None else "iou"
    confidences = detections.class_scores
    if scoring == "mean":
        confidences = mask_confidence(detections.class_scores, probs[position])
    elif scoring == "iou":
        if output.mask_iou is None:
            raise HeadError("this head predicts no mask IoU; score by mean or class instead")
        iou = output.mask_iou.float().cpu()[position, detections.labels]
        confidences = mask_iou_confidence(detections.class_scores, iou)
    if not head.config.roialign:
        # These masks lie over the whole image.
        corners = corners.new_tensor([0, 0, 1, 1]).expand_as(corners)
    original = scale_boxes(corners, image.geometry.original_hw)
    return MaskPrediction(detections, confidences.double().numpy(), position, probs, original)


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
