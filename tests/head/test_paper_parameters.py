"""The parameter column of the paper's tables, from the modules as built (H-DETR R50 geometry)."""

from dataclasses import replace
from typing import Any

import pytest

from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.mask_head import MaskHead
from tests.support.images import make_spec

FINAL = HeadConfig()
NO_SCORING = replace(FINAL, mask_scoring=False)
# Table 5 has no neck; its first row has no query encoder, Table 3 no channel mapper either.
TABLE_5 = replace(NO_SCORING, neck=False)
TABLE_4 = replace(TABLE_5, query_b2o=False, query_ffn=False)
TABLE_3 = replace(TABLE_4, hidden_dim=256)
TABLE_2 = replace(TABLE_3, box_layers=0)


def rows() -> list[tuple[str, HeadConfig, float]]:
    found: list[tuple[str, HeadConfig, float]] = []

    def add(table: str, base: HeadConfig, published: float, **changes: Any) -> None:
        found.append((f"table {table} {changes}", replace(base, **changes), published))

    for block, published in (
        ("deformable", (0.76, 1.51, 2.27)),
        ("swin", (0.80, 1.59, 2.39)),
        ("convnext", (0.54, 1.08, 1.62)),
    ):
        for layers, millions in enumerate(published, 1):
            add("2", TABLE_2, millions, image_block=block, image_layers=layers)
    for block, published in (
        ("deformable", (2.46, 3.14, 3.82)),
        ("swin", (2.31, 3.10, 3.89)),
        ("convnext", (2.05, 2.59, 3.13)),
    ):
        for layers, millions in enumerate(published, 1):
            add("3", TABLE_3, millions, box_block=block, box_layers=layers)
    for width, millions in ((256, 3.14), (128, 2.07), (96, 1.87), (64, 1.71)):
        add("4", TABLE_4, millions, hidden_dim=width)
    add("5", TABLE_4, 2.33, query_ffn=True)
    add("5", TABLE_4, 2.53, query_ffn=True, query_o2o=True)
    add("5", TABLE_4, 2.46, query_ffn=True, query_b2o=True)
    add("6", TABLE_5, 2.53, neck=True)
    add("6", FINAL, 3.26)
    for size, millions in ((16, 2.97), (32, 3.26), (64, 4.44)):
        add("9", FINAL, millions, roi_size=size)
    add("12", FINAL, 3.29, mask_predictor="segmenter")
    return found


@pytest.mark.parametrize(("row", "config", "millions"), rows(), ids=lambda v: str(v)[:60])
def test_parameters_are_the_papers(row: str, config: HeadConfig, millions: float) -> None:
    spec = make_spec(
        width=256,
        c1_channels=256,
        strides=(8, 16, 32, 64),
        num_labels=91,
        num_queries=300,
        level_embed=True,
    )
    counted = sum(p.numel() for p in MaskHead(config, spec).parameters())
    assert round(counted / 1e6, 2) == millions
