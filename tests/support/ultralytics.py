"""A small RT-DETR of ultralytics: names and shapes as its code gives them, weights by a rule."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Outputs of ultralytics' code in float64 for a narrow rtdetr-l whose second stage has two blocks as
# rtdetr-x has it, with these weights, and the shapes of its tensors.
GOLDEN = Path(__file__).parent.parent / "detectors/ultralytics_rt_detr.npz"


def ultralytics_weights() -> dict[str, Tensor]:
    """The state dict; each tensor's values depend on its name alone."""
    about = json.loads(str(np.load(GOLDEN)["about"]))
    return {name: _values(name, tuple(shape)) for name, shape in about["shapes"].items()}


def _values(name: str, shape: tuple[int, ...]) -> Tensor:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    values = random.standard_normal(shape)
    if name.endswith("running_var"):
        values = random.uniform(0.2, 1.2, shape)
    elif len(shape) > 1:
        values = values * (0.6 / np.prod(shape[1:])) ** 0.5
    else:
        values = values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return torch.from_numpy(values.astype(np.float32))
