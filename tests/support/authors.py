"""Checkpoints in the authors' layouts for tests: by the goldens' rule, and small ones."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.support.official import load_rule


def golden_weights(goldens: Path, variant: str, *, without: str = "none") -> dict[str, Tensor]:
    """The state dict of a golden folder: by the rule, and kept entries as the model makes them."""
    folder = goldens / variant
    keys = json.loads((folder / "state_dict_keys.json").read_text())
    tied = json.loads((folder / "tied_keys.json").read_text())
    meta = json.loads((folder / "meta.json").read_text())
    rule = load_rule(goldens, "rule2")
    side = next(iter(meta["cases"].values()))["sizes_hw"][0]
    found = {}
    for key, about in keys.items():
        if key.endswith(without):
            continue
        shape = about["shape"] if isinstance(about, dict) else about[1]
        kept = meta["kept"].get(key)
        if kept is None:
            found[key] = torch.from_numpy(rule.param(tied.get(key, key), shape, meta["salt"]))
        elif "value" in kept:
            kind = getattr(torch, kept["dtype"])
            found[key] = torch.tensor(kept["value"], dtype=kind).reshape(kept["shape"])
        elif key.endswith("anchors"):
            found[key] = anchors(side, shape[1])
        else:
            assert key.endswith("valid_mask"), key
            found[key] = torch.ones(shape, dtype=torch.bool)
    return found


def anchors(side_hw: tuple[int, int], tokens: int) -> Tensor:
    """Anchors as RT-DETR and its descendants make them: logits of cx, cy, w, h."""
    for finest in (8, 16):
        boxes = []
        for level, stride in enumerate(s for s in (8, 16, 32) if s >= finest):
            height, width = (-(-side // stride) for side in side_hw)
            y, x = np.mgrid[:height, :width]
            size = np.full(height * width, 0.05 * 2**level)
            centres = [(x.ravel() + 0.5) / width, (y.ravel() + 0.5) / height]
            boxes.append(np.stack([*centres, size, size], 1))
        found = np.concatenate(boxes)
        if len(found) == tokens:
            valid = ((found > 0.01) & (found < 0.99)).all(1, keepdims=True)
            logits = np.where(valid, np.log(found / (1 - found)), np.inf)
            return torch.from_numpy(logits.astype(np.float32))[None]
    raise AssertionError(f"no levels give {tokens} tokens at {side_hw}")
