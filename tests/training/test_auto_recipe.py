"""What ``--recipe auto`` makes of a cache."""

from pathlib import Path

import pytest
import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.training import auto_recipe
from mfdetr_cache.training.auto_recipe import fitted_recipe
from mfdetr_cache.training.recipes import asked_recipe, build_recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("images", "device", "name", "steps"),
    [
        (200, CPU, "fast", 2600),
        (200, CUDA, "fast", 2600),
        (1000, CPU, "fast", 2600),
        (1000, CUDA, "fast", 7500),
        (120_000, CPU, "fast", 2600),
        (120_000, CUDA, "paper", 90_000),
    ],
)
def test_length_follows_from_images_and_device(
    drawn_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    images: int,
    device: torch.device,
    name: str,
    steps: int,
) -> None:
    monkeypatch.setattr(auto_recipe, "trainable_rows", lambda *_: [0] * images)
    recipe, _ = fitted_recipe(FeatureCache.open(drawn_cache), {}, device, has_length=False)
    assert (recipe.name, recipe.train.steps) == (name, steps)


def test_objects_of_few_cells_get_no_finer_grid(drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    largest = max(
        float((b := cache.ground_truth(row).boxes_xyxy)[:, 2:].max() - b[:, :2].min())
        for row in cache.rows
    )
    assert largest / 4 > 8  # cells of C1
    for roi_size, fine_size in ((8, 64), (32, 0)):
        given = {"roi_size": str(roi_size)}
        recipe, _ = fitted_recipe(cache, given, CPU, has_length=False)
        assert (recipe.head.roi_size, recipe.head.fine_size) == (roi_size, fine_size)


def test_what_is_given_stays(drawn_cache: Path) -> None:
    given = {"steps": "7", "fine_size": "32", "lr": "1e-4"}
    asked = asked_recipe("auto", given)
    assert asked.name == "auto"
    cache = FeatureCache.open(drawn_cache)
    recipe, why = fitted_recipe(cache, asked.given, CPU, has_length=False)
    assert recipe == build_recipe("fast", given)
    assert not any("steps" in line for line in why)


def test_a_file_of_settings_leaves_nothing_to_choose(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        asked_recipe("auto", {}, tmp_path / "config.json")
