"""Pictures: what a head makes of cached images, beside the annotated masks."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.evaluation.inference import MaskPrediction, predict_masks
from mfdetr_cache.evaluation.overlay import OverlayItem, draw_overlay, side_by_side
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.masks import decode_run_lengths, paste_mask_in_image
from mfdetr_cache.types import CachedImage


def picture_of_path(
    cache: FeatureCache,
    row: int,
    head: MaskHead,
    images: Path,
    device: torch.device,
    threshold: float = 0.3,
) -> Image.Image:
    """One image on its way: as it is, with the detector's boxes, with masks, with the annotation.

    Args:
        cache: The cache.
        row: Row of the image.
        head: A trained head, on the device, in evaluation mode.
        images: Image folder.
        device: Where the head is.
        threshold: Least class score of what is shown.

    Returns:
        Four panels side by side.
    """
    cached = cache.read(row, head.map_names)
    size_hw = cached.geometry.original_hw
    image = load_image(images / cached.file_name, size_hw)
    prediction = predict_masks(head, cached, cache.spec, device)
    shown = _items(cache, prediction, size_hw, threshold)
    boxes = [OverlayItem(i.text, i.box_xyxy, None) for i in shown]
    masks = [OverlayItem("", None, i.mask) for i in shown]
    return side_by_side(
        [
            ("image", image),
            (f"frozen detector, {cache.spec.name}", draw_overlay(image, boxes)),
            ("masks from the cache", draw_overlay(image, masks)),
            ("annotation", draw_overlay(image, _annotated(cache, cached))),
        ]
    )


def _items(
    cache: FeatureCache, prediction: MaskPrediction, size_hw: tuple[int, int], threshold: float
) -> list[OverlayItem]:
    """Detections above the threshold, one per query, the most confident last."""
    names = {int(c["id"]): str(c["name"]) for c in cache.categories}
    items: list[OverlayItem] = []
    seen: set[int] = set()
    for index in range(len(prediction.detections)):
        score = float(prediction.detections.class_scores[index])
        mask_index = int(prediction.mask_index[index])
        if score < threshold or mask_index in seen:
            continue
        seen.add(mask_index)
        box = prediction.boxes_xyxy[mask_index].double().numpy()
        mask = paste_mask_in_image(prediction.mask_probs[mask_index].numpy(), box, size_hw)
        category = cache.label_categories[int(prediction.detections.labels[index])]
        text = f"{names.get(category, '?')} {score:.2f}"
        x0, y0, x1, y1 = (float(v) for v in box)
        items.append(OverlayItem(text, (x0, y0, x1, y1), mask))
    return items[::-1]


def _annotated(cache: FeatureCache, cached: CachedImage) -> list[OverlayItem]:
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
