"""A small recipe, and trainings with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.head.folder import load_head
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.recipes import Recipe, build_recipe
from tests.support.configs import changed

SMALL = {
    "hidden_dim": "16",
    "roi_size": "8",
    "fine_size": "0",
    "steps": "4",
    "batch_size": "3",
    "min_match_iou": "0",
    "lr": "1e-3",
}


def small_settings(**changes: Any) -> dict[str, str]:
    return {**SMALL, **{k: str(v) for k, v in changes.items()}}


def small_recipe(name: str = "fast", **changes: Any) -> Recipe:
    return build_recipe(name, small_settings(**changes))


def train(
    cache: Path,
    out: Path,
    recipe: Recipe | None = None,
    on_step: Callable[[int], None] | None = None,
    **changes: Any,
) -> Any:
    config = changed(TrainHeadConfig(cache, out, recipe or small_recipe()), **changes)
    return run_train_head(config, SilentReporter(), on_step)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs have ended with the same weights, to the bit."""
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(w, theirs[k]) for k, w in ours.items())


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_head(out).head.state_dict()
