"""The parameter and FLOP columns of the paper, from the modules as built (H-DETR R50 geometry)."""

import copy
import dataclasses
import functools
import json
import runpy
from pathlib import Path

import pytest
import torch
from mfdetr_pipelines.ablation.comparison import PAPER_TABLES
from mfdetr_pipelines.ablation.rows import AblationRow

from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.cost import HeadCost, head_cost, paper_detector
from mfdetr_cache.head.image_encoder import DeformableImageEncoder
from mfdetr_cache.head.query_encoder import BoxToObject
from tests.support.images import make_batch, make_spec

COUNTED = (1, 2, 3, 4, 5, 6, 9, 12)
ROWS = [
    pytest.param(row, id=f"table {n} {row.name}") for n in COUNTED for row in PAPER_TABLES[n].rows
]


@functools.cache
def cost_with_h_detr(config: HeadConfig) -> HeadCost:
    return head_cost(config, paper_detector())


@pytest.mark.parametrize("row", ROWS)
def test_parameters_and_macs_are_the_papers(row: AblationRow) -> None:
    """Parameters to the printed decimals; multiply-adds to 1 %, as the rule's open points allow.

    The input stands for the images the authors counted on. The largest deviations are rows whose
    figure is printed with three digits (Table 1) and the RoIAlign sizes whose sampling adapts.
    """
    cost = cost_with_h_detr(row.recipe.head)
    assert row.paper.params_m is not None
    assert row.paper.macs_g is not None
    assert round(cost.parameters / 1e6, 2) == row.paper.params_m
    assert cost.macs / 1e9 == pytest.approx(row.paper.macs_g, rel=0.01)
    assert cost.executed_macs <= cost.macs


def test_every_counted_row_is_there() -> None:
    """38 rows of their own, and the first rows of Tables 2 and 3 and Table 6's point sampling."""
    assert len(ROWS) == 41


def test_the_tables_are_the_papers(shared: Path) -> None:
    """Figures against an independent transcription."""
    document = json.loads((shared / "design/paper_tables.json").read_text())["tables"]
    for number, table in PAPER_TABLES.items():
        theirs = document[f"table{number}"]["rows"]
        if table.published:
            ours = [p for p in table.published if p.source == "arXiv 2308.03747"]
            for system, wanted in zip(ours, theirs, strict=True):
                names = ("AP", "AP50", "AP75", "APS", "APM", "APL", "epochs")
                assert system.backbone.removesuffix("-L") in wanted.get(
                    "backbone", wanted.get("detector")
                )
                pairs = {name: name for name in names} | {"box_AP": "AP_box", "hours": "gpu_hours"}
                assert wanted.get("method") in (None, system.system.partition(",")[0])
                for our, their in pairs.items():
                    assert getattr(system, our) == wanted.get(their), (system.system, our)
        if number in (7, 16):
            continue
        if number == 8:  # only the paper's own is ours to train
            theirs = [r for r in theirs if r["method"].startswith("Mask Frozen")]
        for row, wanted in zip(table.rows, theirs, strict=True):
            assert row.paper.params_m == wanted.get("params_m")
            assert row.paper.macs_g == wanted.get("flops_g")
            for name, value in row.paper.metrics.to_dict().items():
                assert value == pytest.approx(wanted.get(name, -100) / 100)


def test_a_finer_grid_is_counted() -> None:
    """What it adds, written out: 32 x 32 cells where 16 x 16 were, 100 boxes."""
    spec, d, w = paper_detector(), 64, 32
    plain = HeadConfig(hidden_dim=d, roi_size=16)
    finer = dataclasses.replace(plain, fine_size=32, fine_dim=w, fine_layers=1)
    cells, coarse = 32 * 32, 16 * 16
    aligned = 17 * d * (cells - coarse)
    context = coarse * (d + 1) * w + d * w  # of the cells, and of the query
    resized = 4 * cells * (w + 1)
    layer = cells * (9 * w + w * w + w)  # with its residual
    correction = cells * (d * w + w + w + 1)  # detail, its sum, dot product, sum
    added = head_cost(finer, spec).macs - head_cost(plain, spec).macs
    assert added == 100 * (aligned + context + resized + layer + correction)


def test_points_are_counted() -> None:
    """PointRend's, written out: subdivisions to 32 x 32 and 64 x 64, 100 boxes."""
    spec, d, w = paper_detector(), 64, 48
    plain = HeadConfig(hidden_dim=d, roi_size=16, mask_scoring=False)
    finer = dataclasses.replace(plain, fine_size=64, fine_block="points", fine_dim=w, fine_layers=2)
    points = 784 + 784
    aligned = 17 * d * (64 * 64 - 16 * 16)
    resized = 4 * (32 * 32 + 64 * 64)
    sampled = 4 * points * (d + 1)
    layers = points * ((d + 1) * w + (w + 1) * w + (w + 1))
    added = head_cost(finer, spec).macs - head_cost(plain, spec).macs
    assert added == 100 * (aligned + resized + sampled + layers)


def test_a_stage_of_refinement_is_counted() -> None:
    """ISTR's, written out: 100 boxes of 8 x 8 cells, d channels, codes of K numbers."""
    spec, d, k = paper_detector(), 64, 30
    one = dataclasses.replace(
        HeadConfig(hidden_dim=d, roi_size=8, box_layers=0, mask_scoring=False, query_ffn=False),
        query_b2o=False,
        mask_predictor="refined",
        mask_embedding_dim=k,
        refinement_stages=1,
    )
    two = dataclasses.replace(one, refinement_stages=2)
    cells, inner, others = 8 * 8, d // 4, 100
    aligned = 17 * d * cells
    attention = 3 * d * d + 2 * others * d
    region = d * 2 * d * inner + cells * 2 * d * inner + cells * d * d
    towers = 2 * 3 * d * d + d * 4 + d * k
    added = head_cost(two, spec).macs - head_cost(one, spec).macs
    assert added == 100 * (aligned + attention + region + 2 * 8 * d * d + towers)


def test_counting_follows_the_size() -> None:
    """Twice the area costs twice the image part and the same box part."""
    spec, config = paper_detector(), HeadConfig()
    small, large = (head_cost(config, spec, (512, w)).macs for w in (512, 1024))
    largest = head_cost(config, spec, (512, 1536)).macs
    # Sizes that every stride divides: the cost is exactly linear in the area.
    assert largest - large == large - small


@pytest.mark.parametrize("part", ["every_token", "folded"])
def test_what_is_left_out_changes_nothing(part: str) -> None:
    """The head as the paper counts it and as it runs here: the same function, also its gradients.

    In float64 both orders of summation agree to far better than 1e-10.
    """
    spec = make_spec(strides=(8, 16, 32, 64))
    torch.manual_seed(0)
    ours = build_head(HeadConfig(hidden_dim=16, roi_size=8), spec).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs = copy.deepcopy(ours)
    changed = 0
    for module in theirs.modules():
        if part == "every_token" and isinstance(module, DeformableImageEncoder):
            module.every_token, changed = True, changed + 1
        elif part == "folded" and isinstance(module, BoxToObject):
            module.folded, changed = False, changed + 1
    assert changed == 1
    batch = make_batch(spec, [(96, 128), (64, 96)], dtype=torch.float64)
    first, second = ours(batch), theirs(batch)
    torch.testing.assert_close(first.mask_logits, second.mask_logits, rtol=0, atol=1e-10)
    first.mask_logits.square().sum().backward()
    second.mask_logits.square().sum().backward()
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if one.grad is not None:
            assert two.grad is not None, name
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_the_training_free_rows_run() -> None:
    """Table 1: masks without a trained parameter, with and without RoIAlign and C1."""
    spec = make_spec(width=32, c1_channels=32)
    batch = make_batch(spec, [(96, 128)])
    for row in PAPER_TABLES[1].rows:
        recipe = row.recipe
        config = HeadConfig(
            **{
                **{f: getattr(recipe.head, f) for f in recipe.head.__slots__},
                "hidden_dim": 32,
            }
        )
        head = build_head(config, spec)
        assert not list(head.parameters())
        shape = head(batch).mask_logits.shape
        assert shape == ((3, 32, 32) if config.roialign else (3, 24, 32))


def test_the_paper_map_is_what_its_command_writes() -> None:
    root = Path(__file__).resolve().parents[2]
    script = runpy.run_path(str(root / "scripts/write_paper_map.py"))
    costs = {"head_cost": lambda config, _: cost_with_h_detr(config)}
    script["paper_map"].__globals__.update(costs)
    assert script["paper_map"]() == (root / "docs/paper-map.md").read_text()
