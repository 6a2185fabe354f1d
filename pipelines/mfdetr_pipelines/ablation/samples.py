"""Masks of every row on the same sample images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.categories import category_names
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.evaluation.inference import predict_masks
from mfdetr_cache.evaluation.overlay import OverlayItem, draw_overlay
from mfdetr_cache.evaluation.panels import annotated_objects
from mfdetr_cache.evaluation.segmentation import Segmentation
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.folder import HEAD_FILE, load_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.order import trainable_rows
from mfdetr_pipelines.ablation.caches import Caches
from mfdetr_pipelines.ablation.job import row_folder
from mfdetr_pipelines.ablation.result import RowResult
from mfdetr_pipelines.ablation.rows import AblationRow
from mfdetr_pipelines.ablation.training import validation_of
from mfdetr_pipelines.pages.page import Panel, PanelRow

_THRESHOLD = 0.25


def sample_masks(
    caches: Mapping[str, Caches],
    results: Sequence[RowResult],
    out: Path,
    images: Path,
    count: int = 4,
) -> list[PanelRow]:
    """Annotation and masks of every row's first seed on ``count`` validation images.

    One row of panels per image; ``out`` is the folder of the ablation, ``images`` the image folder.
    """
    rows = [r.row for r in results if r.seeds and not r.row.baseline]
    heads = [_shown(out, row, caches[row.name]) for row in rows]
    if not heads:
        return []
    validation = heads[0][2]
    # Images spread over the split, so that not all come from one folder or one hour.
    objects = trainable_rows(validation, TrainConfig())
    chosen = objects[:: max(1, len(objects) // count)][:count]
    return [_panel_row(validation, row, heads, images) for row in chosen]


# A row's name, its head and the cache that it is measured on.
_Shown = tuple[str, MaskHead, FeatureCache]


def _shown(out: Path, row: AblationRow, caches: Caches) -> _Shown:
    folder = row_folder(out, row) / "seed-0"
    cache = validation_of(folder, caches)
    if (folder / HEAD_FILE).is_file():
        return row.name, load_head(folder).head, cache
    return row.name, build_head(row.recipe.head, cache.spec).eval(), cache


def _panel_row(cache: FeatureCache, row: int, heads: Sequence[_Shown], images: Path) -> PanelRow:
    names = category_names(cache.categories)
    truth = cache.read(row, ())
    size_hw = truth.geometry.original_hw
    image = load_image(images / truth.file_name, size_hw)
    panels = [Panel("annotation", draw_overlay(image, annotated_objects(cache, truth)))]
    # All rows mask the same boxes; a box keeps its colour from row to row.
    colours: dict[object, int] = {}
    for name, head, own in heads:
        cached = own.read(row, head.map_names)
        found = predict_masks(head, cached, own.spec, torch.device("cpu"), threshold=_THRESHOLD)
        shown = Segmentation.of(found, cache.label_categories, names, size_hw, _THRESHOLD)
        items = []
        for box, runs in zip(shown.boxes_xyxy.tolist(), shown.run_lengths, strict=True):
            colour = colours.setdefault(tuple(box), len(colours))
            items.append(OverlayItem("", None, runs, colour))
        panels.append(Panel(name, draw_overlay(image, items[::-1])))
    return PanelRow(truth.file_name, tuple(panels))
