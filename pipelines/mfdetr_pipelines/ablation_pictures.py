"""Sample masks of an ablation: what every row makes of the same images."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.evaluation.inference import predict_masks
from mfdetr_cache.evaluation.objects import shown_objects
from mfdetr_cache.evaluation.overlay import OverlayItem, draw_overlay, side_by_side
from mfdetr_cache.head.folder import HEAD_FILE, load_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_pipelines.ablate import AblateConfig, RowResult, folder_of
from mfdetr_pipelines.pictures import annotated_objects
from mfdetr_pipelines.training_loop import trainable_rows

_THRESHOLD = 0.25
_PANEL_HEIGHT = 240
# What the page shows without shrinking it.
_SHEET_WIDTH = 1400


def sample_strips(
    config: AblateConfig, results: Sequence[RowResult], images: Path, count: int = 4
) -> list[str]:
    """The annotation of some validation images, and the masks of every row, side by side.

    Args:
        config: The ablation.
        results: Its results; the first seed of each is shown.
        images: Folder of the validation images.
        count: How many images.

    Returns:
        JPEG data URLs, one per image.
    """
    validation = FeatureCache.open(config.val_cache)
    shown = [r for r in results if r.seeds and not r.plan.row.baseline]
    heads = [(r.plan.row.name, _head(config, r, validation)) for r in shown]
    # Images spread over the split, so that not all come from one folder or one hour.
    rows = trainable_rows(validation)
    chosen = rows[:: max(1, len(rows) // count)][:count]
    return [_strip(validation, row, heads, images) for row in chosen]


def _head(config: AblateConfig, result: RowResult, cache: FeatureCache) -> MaskHead:
    folder = folder_of(config, result.plan.row, 0)
    if (folder / HEAD_FILE).is_file():
        return load_head(folder).head
    return MaskHead(result.plan.row.recipe.head, cache.spec).eval()


def _strip(
    cache: FeatureCache, row: int, heads: Sequence[tuple[str, MaskHead]], images: Path
) -> str:
    names = {int(c["id"]): str(c["name"]) for c in cache.categories}
    panels: list[tuple[str, Image.Image]] = []
    # All rows mask the same boxes; a box keeps its colour from row to row.
    colours: dict[object, int] = {}
    for name, head in heads:
        cached = cache.read(row, head.map_names)
        size_hw = cached.geometry.original_hw
        picture = load_image(images / cached.file_name, size_hw)
        if not panels:
            panels.append(("annotation", draw_overlay(picture, annotated_objects(cache, cached))))
        found = predict_masks(head, cached, cache.spec, torch.device("cpu"))
        shown = shown_objects(found, cache.label_categories, names, size_hw, _THRESHOLD)
        for found_object in shown:
            colours.setdefault(found_object.box_xyxy, len(colours))
        items = [OverlayItem("", None, o.mask, colours[o.box_xyxy]) for o in reversed(shown)]
        panels.append((name, draw_overlay(picture, items)))
    sheet = side_by_side(panels, height=_PANEL_HEIGHT, max_width=_SHEET_WIDTH)
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
