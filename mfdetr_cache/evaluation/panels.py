"""Panels side by side: an image, its detections, predicted and annotated masks."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.evaluation.inference import predict_masks
from mfdetr_cache.evaluation.objects import shown_objects
from mfdetr_cache.evaluation.overlay import PANEL_SIDE, OverlayItem, draw_overlay, side_by_side
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.types import CachedImage


def prediction_panels(
    cache: FeatureCache,
    row: int,
    head: MaskHead,
    images: Path,
    device: torch.device,
    threshold: float = 0.25,
) -> Image.Image:
    """Four titled panels: an image, the detector's boxes, the head's masks, the annotated masks.

    Args:
        cache: The cache.
        row: Row of the image.
        head: A trained head, on the device, in evaluation mode.
        images: Image folder.
        device: Device of the head.
        threshold: Lowest confidence shown.

    Returns:
        The panels side by side.
    """
    cached = cache.read(row, head.map_names)
    size_hw = cached.geometry.original_hw
    image = load_image(images / cached.file_name, size_hw)
    prediction = predict_masks(head, cached, cache.spec, device)
    names = category_names(cache.categories)
    found = shown_objects(prediction, cache.label_categories, names, size_hw, threshold)
    # The most confident is drawn last, on top.
    shown = [o.to_item() for o in reversed(found)]
    boxes = [OverlayItem(i.text, i.box_xyxy, None) for i in shown]
    masks = [OverlayItem("", None, i.run_lengths) for i in shown]
    return side_by_side(
        [
            ("image", image),
            (f"frozen detector, {cache.spec.name}", draw_overlay(image, boxes, PANEL_SIDE)),
            ("masks from the cache", draw_overlay(image, masks, PANEL_SIDE)),
            ("annotation", draw_overlay(image, annotated_objects(cache, cached), PANEL_SIDE)),
        ]
    )


def annotated_objects(cache: FeatureCache, cached: CachedImage) -> list[OverlayItem]:
    """The annotated masks of an image by falling area, named, without boxes and crowds."""
    names = category_names(cache.categories)
    truth = cached.ground_truth
    order = np.argsort(-truth.areas)
    return [
        OverlayItem(names.get(int(truth.category_ids[i]), "?"), None, truth.run_lengths[i])
        for i in order
        if not truth.is_crowd[i] and truth.has_mask[i]
    ]
