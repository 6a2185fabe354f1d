"""Panels side by side: an image, its detections, predicted and annotated masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.evaluation.inference import predict_masks
from mfdetr_cache.evaluation.overlay import (
    PANEL_SIDE,
    OverlayItem,
    draw_overlay,
    draw_probabilities,
)
from mfdetr_cache.evaluation.segmentation import Segmentation
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.ops.boxes import box_iou
from mfdetr_cache.types import CachedImage

# IoU of boxes above which a detection and an annotation are shown in one colour.
_SAME_OBJECT = 0.3
_LEAST_CONFIDENCE = 0.25
_NO_BOXES = np.zeros((0, 4), np.float32)


def prediction_panels(
    cache: FeatureCache, row: int, head: MaskHead, images: Path, device: torch.device
) -> list[tuple[str, Image.Image]]:
    """An image, the detector's boxes, the head's masks, how probable they are, and the annotation.

    Each has a title. An object has one colour wherever objects have colours; of several on a pixel
    the most probable is shown (Fig. 4 and 8). The head is on the device, in evaluation mode;
    ``images`` is the image folder.
    """
    cached = cache.read(row, head.map_names)
    size_hw = cached.geometry.original_hw
    image = load_image(images / cached.file_name, size_hw)
    prediction = predict_masks(head, cached, cache.spec, device, threshold=_LEAST_CONFIDENCE)
    names = category_names(cache.categories)
    found = Segmentation.of(prediction, cache.label_categories, names, size_hw, _LEAST_CONFIDENCE)
    boxes = [replace(item, run_lengths=None) for item in found.overlay()]
    masks = [replace(item, text="", box_xyxy=None) for item in found.overlay()]
    probable = np.zeros(size_hw, np.uint8)
    for index in range(len(found)):
        np.maximum(probable, found.probabilities(index), out=probable)
    annotated = annotated_objects(cache, cached, found.boxes_xyxy[::-1].copy())
    return [
        ("image", image),
        (f"frozen detector, {cache.spec.name}", draw_overlay(image, boxes, PANEL_SIDE)),
        ("masks from the cache", draw_overlay(image, masks, PANEL_SIDE)),
        ("probability of each pixel", draw_probabilities(image, probable)),
        ("annotation", draw_overlay(image, annotated, PANEL_SIDE)),
    ]


def same_objects(iou: NDArray[np.floating]) -> dict[int, int]:
    """Which detection an annotated object is, for IoUs (objects, detections).

    Detections are in the order of rising confidence: of several of one object it is the most
    confident, which is drawn on top.
    """
    pairs: dict[int, int] = {}
    for detection in reversed(range(iou.shape[1])):
        free = [i for i in range(len(iou)) if i not in pairs]
        best = max(free, key=lambda i: float(iou[i, detection]), default=None)
        if best is not None and iou[best, detection] > _SAME_OBJECT:
            pairs[best] = detection
    return pairs


def annotated_objects(
    cache: FeatureCache, cached: CachedImage, detected_xyxy: NDArray[np.float32] = _NO_BOXES
) -> list[OverlayItem]:
    """The annotated masks of an image by falling area, named, without boxes and crowds.

    An object that is among the detected ones has the colour of its place there.
    """
    names = category_names(cache.categories)
    truth = cached.ground_truth
    order = [i for i in np.argsort(-truth.areas) if not truth.is_crowd[i] and truth.has_mask[i]]
    colours = {index: len(detected_xyxy) + place for place, index in enumerate(order)}
    iou = box_iou(torch.from_numpy(truth.boxes_xyxy[order]), torch.from_numpy(detected_xyxy))
    colours |= {order[i]: j for i, j in same_objects(iou.numpy()).items()}
    return [
        OverlayItem(
            names.get(int(truth.category_ids[i]), "?"), None, truth.run_lengths[i], colours[i]
        )
        for i in order
    ]
