"""Small ablations on drawn scenes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mfdetr_pipelines.ablation.comparison import Comparison
from mfdetr_pipelines.ablation.rows import (
    AblationRow,
    with_settings,
)
from mfdetr_pipelines.config.ablate import AblateConfig

from mfdetr_cache.training.recipes import build_recipe

SMALL = {
    "hidden_dim": "8",
    "roi_size": "8",
    "fine_size": "0",
    "image_layers": "1",
    "box_layers": "1",
}


def rows() -> tuple[AblationRow, ...]:
    first = build_recipe("fast", {**SMALL, "batch_size": "4", "mask_scoring": "true"})
    second = replace(first, head=replace(first.head, mask_scoring=False))
    return (AblationRow("with scoring", first), AblationRow("without", second))


def config(drawn_cache: Path, out: Path, **changes: Any) -> AblateConfig:
    settings: dict[str, Any] = {"rows": rows(), "seeds": 2, **changes}
    chosen = with_settings(settings.pop("rows"), {}, {"steps": settings.pop("steps", 2)})
    compared = Comparison("rows", chosen)
    return AblateConfig(
        compared, cache=(str(drawn_cache),), val_cache=(str(drawn_cache),), out=out, **settings
    )
