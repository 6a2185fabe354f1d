"""The recipe that a cache asks for: ``--recipe auto``."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.matching.objects import trainable_objects
from mfdetr_cache.training.order import steps_per_epoch, trainable_rows
from mfdetr_cache.training.recipes import Recipe, build_recipe
from mfdetr_cache.training.settings import settings_of_crops

# From here on the paper's head and its six epochs, on a GPU.
_LARGE, _EPOCHS_OF_LARGE = 10_000, 6
# What the steps of `fast` are on 350 images.
_EPOCHS = 15
_C1_STRIDE = 4
_WITHOUT_C1 = {"use_c1": "false", "fine_size": "0"}
# So many images tell the sizes of objects.
_LOOKED_AT = 1000


def fitted_recipe(
    cache: FeatureCache, given: Mapping[str, str], device: torch.device, *, has_length: bool
) -> tuple[Recipe, tuple[str, ...]]:
    """A recipe for a cache and a device, with the settings that are given; and why it is this one.

    ``has_length``: its length is given elsewhere.

    TrainingError if no image has an object to learn from.
    """
    rows = trainable_rows(cache, build_recipe("fast", given).train)
    is_large = device.type == "cuda" and len(rows) >= _LARGE
    name, epochs = ("paper", _EPOCHS_OF_LARGE) if is_large else ("fast", _EPOCHS)
    base = build_recipe(name, given)
    why = [f"{name} for {len(rows)} images with objects on a {device.type.upper()}"]
    chosen: dict[str, str] = {}
    layout = cache.layout
    if layout.c1 != "full":
        crops = layout.c1_roi
        fixed = settings_of_crops(crops, base.head) if crops is not None else _WITHOUT_C1
        chosen = {name: str(value) for name, value in fixed.items()}
        why.append(f"{_typed(chosen)} for C1 as the cache has it (--c1 {layout.c1})")
    elif base.head.fine_size and "fine_size" not in given:
        cells = _side_of_large_objects(cache, rows)
        if cells <= base.head.roi_size:
            chosen = {"fine_size": "0", "roi_sampling_ratio": "2", "num_points": "256"}
            why.append(f"{_typed(chosen)}: nine of ten objects are at most {cells:.0f} cells of C1")
    steps = epochs * steps_per_epoch(len(rows), base.train.batch_size)
    is_open = not has_length and "steps" not in given
    if is_open and device.type == "cuda" and (is_large or steps > base.train.steps):
        chosen["steps"] = str(steps)
        why.append(f"steps={steps}: {epochs} epochs")
    return build_recipe(name, {**chosen, **given}), tuple(why)


def _typed(settings: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _side_of_large_objects(cache: FeatureCache, rows: Sequence[int]) -> float:
    """Longer side, in cells of C1, that nine of ten objects do not exceed."""
    sides = []
    for row in rows[:: max(1, len(rows) // _LOOKED_AT)]:
        truth, geometry = cache.ground_truth(row), cache.geometry(row)
        boxes = truth.boxes_xyxy[trainable_objects(truth)]
        (height, width), (own_height, own_width) = geometry.resized_hw, geometry.original_hw
        scale = np.array([width / own_width, height / own_height]) / _C1_STRIDE
        sides.append(((boxes[:, 2:] - boxes[:, :2]) * scale).max(axis=1))
    return float(np.quantile(np.concatenate(sides), 0.9))
