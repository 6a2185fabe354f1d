"""Pictures: what a head makes of cached images, beside the annotated masks."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.evaluation.inference import predict_masks
from mfdetr_cache.evaluation.objects import shown_objects
from mfdetr_cache.evaluation.overlay import OverlayItem, draw_overlay, side_by_side
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.ops.masks import decode_run_lengths
from mfdetr_cache.types import CachedImage

# Panels are drawn about this large, in pixels of the longer side.
_PANEL_SIDE = 400


def picture_of_path(
    cache: FeatureCache,
    row: int,
    head: MaskHead,
    images: Path,
    device: torch.device,
    threshold: float = 0.25,
) -> Image.Image:
    """One image on its way: as it is, with the detector's boxes, with masks, with the annotation.

    Args:
        cache: The cache.
        row: Row of the image.
        head: A trained head, on the device, in evaluation mode.
        images: Image folder.
        device: Where the head is.
        threshold: Least confidence of what is shown.

    Returns:
        Four panels side by side.
    """
    cached = cache.read(row, head.map_names)
    size_hw = cached.geometry.original_hw
    image = load_image(images / cached.file_name, size_hw)
    prediction = predict_masks(head, cached, cache.spec, device)
    names = {int(c["id"]): str(c["name"]) for c in cache.categories}
    found = shown_objects(prediction, cache.label_categories, names, size_hw, threshold)
    # The most confident is drawn last, on top.
    shown = [o.to_item() for o in reversed(found)]
    scale = max(1, round(_PANEL_SIDE / max(size_hw)))
    boxes = [OverlayItem(i.text, i.box_xyxy, None) for i in shown]
    masks = [OverlayItem("", None, i.mask) for i in shown]
    return side_by_side(
        [
            ("image", image),
            (f"frozen detector, {cache.spec.name}", draw_overlay(image, boxes, scale)),
            ("masks from the cache", draw_overlay(image, masks, scale)),
            ("annotation", draw_overlay(image, annotated_objects(cache, cached), scale)),
        ]
    )


def annotated_objects(cache: FeatureCache, cached: CachedImage) -> list[OverlayItem]:
    """The annotated masks of an image, small ones last, on top.

    Args:
        cache: The cache.
        cached: One of its images.

    Returns:
        Named masks without boxes; crowds are left out.
    """
    names = {int(c["id"]): str(c["name"]) for c in cache.categories}
    truth, size_hw = cached.ground_truth, cached.geometry.original_hw
    order = np.argsort(-truth.areas)
    return [
        OverlayItem(
            names.get(int(truth.category_ids[i]), "?"),
            None,
            decode_run_lengths(truth.run_lengths[i], size_hw),
        )
        for i in order
        if not truth.is_crowd[i]
    ]
