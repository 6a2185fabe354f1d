"""Key tables of all published sizes: nothing is left over, nothing stays empty."""

import json
from pathlib import Path

import pytest
import torch

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.huggingface.loading import quiet
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.translated.loading import build, read_blueprint, recognised

_TABLES = {
    "rtdetr": "rt-detr",
    "rtdetrv2": "rt-detr-v2",
    "dfine": "d-fine",
    "deim": "deim",
    "deimv2": "deimv2",
    "rfdetr": "rf-detr",
    "lwdetr": "lw-detr",
}


@pytest.mark.parametrize("family", list(_TABLES))
def test_every_published_key_has_its_place(shared: Path, family: str) -> None:
    """By their shapes alone."""
    tables = sorted((shared / "goldens-2/key_tables" / family).glob("*.json"))
    if not tables:
        pytest.skip("../shared/goldens-2 is not there")
    name = _TABLES[family]
    for table in tables:
        about = json.loads(table.read_text())
        with torch.device("meta"):
            weights = {
                key: torch.empty(shape, dtype=getattr(torch, kind))
                for key, (kind, shape) in about["keys"].items()
            }
        assert name in recognised(weights), table.stem
        blueprint = read_blueprint(name, Checkpoint(table, weights), DetectorOptions())
        with quiet():
            model, _ = build(blueprint, table.stem)
        assert not [n for n, p in model.named_parameters() if not p.is_meta], table.stem
        extra = about["extra"]
        assert model.config.num_queries == extra.get("num_queries", 300), table.stem
        if "resolution" in extra:
            assert blueprint.input_hw == (extra["resolution"],) * 2, table.stem


def test_every_key_of_grounding_dino_has_its_place(shared: Path) -> None:
    """Its numbers take half a minute: tests/real/test_grounding_goldens.py, with -m large."""
    table = shared / "goldens-2/groundingdino_swint/state_dict_keys.json"
    if not table.is_file():
        pytest.skip("../shared/goldens-2 is not there")
    with torch.device("meta"):
        weights = {
            key: torch.empty(about["shape"], dtype=getattr(torch, about["dtype"]))
            for key, about in json.loads(table.read_text()).items()
        }
        assert recognised(weights) == ["grounding-dino"]
        found = read_blueprint("grounding-dino", Checkpoint(table, weights), DetectorOptions())
        with quiet():
            model, _ = build(found, table.stem)
    assert all(p.is_meta for p in model.parameters())
    assert found.input_hw is None
