"""Pictures: what a head makes of cached images, beside the annotated masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.evaluation.inference import MaskPrediction, predict_masks
from mfdetr_cache.evaluation.overlay import OverlayItem, draw_overlay, side_by_side
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.masks import decode_run_lengths, paste_mask_in_image
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


@dataclass(frozen=True, slots=True)
class ShownObject:
    """One detected object worth showing.

    Attributes:
        category_id: Its category.
        name: Name of the category.
        confidence: Final score s_i.
        box_xyxy: In original image pixels.
        mask: True inside, at the original size.
    """

    category_id: int
    name: str
    confidence: float
    box_xyxy: tuple[float, float, float, float]
    mask: NDArray[np.bool_]

    def to_item(self) -> OverlayItem:
        """The object as something to draw."""
        return OverlayItem(f"{self.name} {self.confidence:.2f}", self.box_xyxy, self.mask)


def shown_objects(
    prediction: MaskPrediction,
    label_categories: Sequence[int],
    names: Mapping[int, str],
    size_hw: tuple[int, int],
    threshold: float,
    top_k: int = 100,
) -> list[ShownObject]:
    """The most confident label of every query, above a threshold.

    Args:
        prediction: Detections and masks of one image.
        label_categories: Category id of each label, -1 for none.
        names: Category id to name.
        size_hw: Height and width of the original image in pixels.
        threshold: Least confidence.
        top_k: At most so many.

    Returns:
        Objects by falling confidence.
    """
    shown: list[ShownObject] = []
    seen: set[int] = set()
    for index in np.argsort(-prediction.confidences, kind="stable").tolist():
        confidence = float(prediction.confidences[index])
        mask_index = int(prediction.mask_index[index])
        category_id = label_categories[int(prediction.detections.labels[index])]
        if confidence < threshold or len(shown) == top_k:
            break
        if mask_index in seen or category_id < 0:
            continue
        seen.add(mask_index)
        box = prediction.boxes_xyxy[mask_index].double().numpy()
        mask = paste_mask_in_image(prediction.mask_probs[mask_index].numpy(), box, size_hw)
        x0, y0, x1, y1 = (float(v) for v in box)
        name = names.get(category_id, str(category_id))
        shown.append(ShownObject(category_id, name, confidence, (x0, y0, x1, y1), mask))
    return shown


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
