"""Official checkpoints for tests: small ones with random weights, and the goldens' rule."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from mfdetr_cache.detectors.official.architecture import Architecture
from mfdetr_cache.detectors.official.backbones import BackboneArchitecture
from mfdetr_cache.detectors.official.detr import OfficialDetr

_FOCAL = BackboneArchitecture(
    "focalnet", (1, 1, 2, 1), 16, kernels=(3, 5, 7, 9), first_stage=0, divides=True
)
_FOCAL3 = BackboneArchitecture("focalnet", (1, 1, 1, 1), 16, kernels=(5, 7, 9), first_stage=1)
_SWIN = BackboneArchitecture("swin", (2, 1, 1, 2), 16, (2, 2, 4, 4), 3)
_SWIN5 = BackboneArchitecture("swin", (1, 1, 1, 1), 16, (2, 2, 4, 4), 4, first_stage=0)
_SMALL: dict[str, Any] = {"num_labels": 6, "hidden": 32, "encoder_layers": 2, "decoder_layers": 2}

SMALL: dict[str, Architecture] = {
    "dino-focalnet-l": Architecture(
        "dino", _FOCAL, num_levels=5, num_queries=12, table_rows=12, **_SMALL
    ),
    "dino": Architecture("dino", _FOCAL3, num_queries=12, table_rows=12, **_SMALL),
    "dino-swin-l": Architecture(
        "dino", _SWIN5, num_levels=5, num_queries=12, table_rows=12, **_SMALL
    ),
    "h-detr-swin-t": Architecture("h-detr", _SWIN, num_queries=12, table_rows=1512, **_SMALL),
    "deformable-detr": Architecture("deformable-detr", _SWIN, num_queries=300, **_SMALL),
}


def write_checkpoint(path: Path, architecture: Architecture, seed: int = 0) -> dict[str, Any]:
    """A checkpoint as the training scripts write it; returns what is in it."""
    torch.manual_seed(seed)
    model = OfficialDetr(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.fill_(0.5)
            elif "class_embed" in name:
                parameter.normal_(std=0.3)
    document = {
        "model": {k: v.clone() for k, v in model.state_dict().items()},
        "epoch": 35,
        "args": argparse.Namespace(lr=2e-4, dataset_file="coco"),
    }
    torch.save(document, path)
    return document


def load_rule(goldens: Path, name: str = "rule") -> Any:
    """The module that makes the weights of the goldens."""
    spec = importlib.util.spec_from_file_location(name, goldens / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rule_weights(goldens: Path, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of a golden folder, and its meta.json."""
    rule = load_rule(goldens)
    keys = json.loads((folder / "state_dict_keys.json").read_text())
    tied = json.loads((folder / "tied_keys.json").read_text())
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    weights = {}
    for key, about in keys.items():
        if key.endswith("relative_position_index"):
            continue
        shape = about["shape"] if isinstance(about, dict) else about[0]
        weights[key] = torch.from_numpy(rule.param(tied.get(key, key), shape, meta["salt"]))
    return weights, meta
