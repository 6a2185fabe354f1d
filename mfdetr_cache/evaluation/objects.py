"""Detected objects to show: the best label of every query, above a threshold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.evaluation.inference import MaskPrediction
from mfdetr_cache.evaluation.overlay import OverlayItem
from mfdetr_cache.ops.masks import RunLengths
from mfdetr_cache.ops.masks_pasting import run_lengths_in_box


@dataclass(frozen=True, slots=True)
class ShownObject:
    """A detected object to show, box and mask in original image pixels.

    ``mask_probs`` over its box, float32 of shape (r, r), gave the mask.
    """

    category_id: int
    name: str
    confidence: float
    box_xyxy: tuple[float, float, float, float]
    run_lengths: RunLengths
    mask_probs: NDArray[np.float32]

    def to_item(self) -> OverlayItem:
        """The object as an overlay: its mask, its box, and its name with the confidence."""
        return OverlayItem(f"{self.name} {self.confidence:.2f}", self.box_xyxy, self.run_lengths)


def shown_objects(
    prediction: MaskPrediction,
    label_categories: Sequence[int],
    names: Mapping[int, str],
    size_hw: tuple[int, int],
    threshold: float,
    top_k: int = 100,
) -> list[ShownObject]:
    """At most ``top_k`` objects by falling confidence, with the best label of every query.

    ``label_categories`` are the category ids of each label, -1 for none.
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
        probs = prediction.mask_probs[mask_index].numpy()
        runs = run_lengths_in_box(probs, box, size_hw)
        x0, y0, x1, y1 = (float(v) for v in box)
        name = names.get(category_id, str(category_id))
        shown.append(ShownObject(category_id, name, confidence, (x0, y0, x1, y1), runs, probs))
    return shown
