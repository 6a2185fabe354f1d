"""A detector's final detections, selected as in its own post-processing."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.ops.boxes import cxcywh_to_xyxy, scale_boxes
from mfdetr_cache.types import CachedImage, DetectorSpec

# COCO evaluates at most this many detections per image.
MAX_DETECTIONS = 100


@dataclass(frozen=True, slots=True)
class Detections:
    """Detections of one image, by falling score. One query may appear with several labels.

    Attributes:
        query_index: Query of each detection, int64, shape (D,).
        labels: The detector's labels, int64, shape (D,).
        class_scores: Scores c_i in [0, 1], shape (D,).
        boxes_xyxy: In original image pixels, not clipped, shape (D, 4).
    """

    query_index: Tensor
    labels: Tensor
    class_scores: Tensor
    boxes_xyxy: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, chosen: Tensor) -> "Detections":
        """Those that a mask (D,) or indices choose."""
        return Detections(*(getattr(self, field.name)[chosen] for field in fields(self)))


def class_probabilities(class_logits: Tensor, spec: DetectorSpec) -> Tensor:
    """Class scores in [0, 1] of logits (..., K); without "no object" for a softmax detector."""
    if spec.score_function == "softmax":
        return class_logits.softmax(-1)[..., :-1]
    return class_logits.sigmoid()


def select_detections(
    class_logits: Tensor,
    boxes_cxcywh_norm: Tensor,
    original_hw: tuple[int, int],
    spec: DetectorSpec,
    max_detections: int = MAX_DETECTIONS,
) -> Detections:
    """The best (query, label) pairs, as Deformable DETR and its descendants select them.

    Logits are (Q, K), boxes (Q, 4) relative to the resized image; the detections, by falling class
    score, are in pixels of the original. Pairs of score 0 are left out: absent queries, and labels
    that a detection does not have.
    """
    scores = class_probabilities(class_logits, spec)
    count = min(max_detections, scores.numel())
    best, index = scores.flatten().topk(count)
    best, index = best[best > 0], index[best > 0]
    query_index = torch.div(index, scores.shape[-1], rounding_mode="floor")
    boxes = scale_boxes(cxcywh_to_xyxy(boxes_cxcywh_norm), original_hw)
    return Detections(query_index, index % scores.shape[-1], best, boxes[query_index])


def detected_queries(image: CachedImage, spec: DetectorSpec) -> NDArray[np.int64]:
    """The queries that the detections of a cached image have, each once, in rising order."""
    queries: NDArray[np.int64] = detections_of(image, spec).query_index.unique().numpy()
    return queries


def detections_of(image: CachedImage, spec: DetectorSpec) -> Detections:
    """The detections of a cached image at original size; its maps are not needed."""
    return select_detections(
        torch.from_numpy(np.array(image.class_logits)),
        torch.from_numpy(np.array(image.boxes_cxcywh_norm)),
        image.geometry.original_hw,
        spec,
    )
