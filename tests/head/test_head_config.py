import json
import os
from pathlib import Path

import pytest
import torch

from mfdetr_cache.config import from_dict, override, to_dict
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.extraction.stream import num_encoders
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.recipes import RECIPES, build_recipe


@pytest.mark.parametrize(
    "config", [HeadConfig(), TrainConfig(drops=(0.5,)), HeadConfig(roi_size=8)]
)
def test_json_round_trip(config: object) -> None:
    assert from_dict(type(config), to_dict(config), "test") == config


def test_text_becomes_the_fields_type() -> None:
    config = override(
        TrainConfig(), {"lr": "2e-3", "steps": "7", "drops": "0.5,0.8", "match": "iou"}, "--set"
    )
    assert (config.lr, config.steps, config.drops, config.match) == (2e-3, 7, (0.5, 0.8), "iou")
    assert override(HeadConfig(), {"neck": "false"}, "--set").neck is False


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ({"hiden_dim": "64"}, "unknown setting 'hiden_dim'; did you mean 'hidden_dim'"),
        ({"hidden_dim": "12"}, "hidden_dim must be a multiple of 8 from 8 to 8192, not 12"),
        ({"hidden_dim": "many"}, "hidden_dim must be of type int, not 'many'"),
        ({"match": "best"}, "match must be one of hungarian, iou, set, not 'best'"),
        ({"neck": "maybe"}, "neck must be true or false, not 'maybe'"),
        ({"roi_size": "20"}, "roi_size must be a multiple of 8 from 8 to 512, not 20"),
        ({"lr": "0"}, "lr must be above 0"),
        ({"lr": "-1"}, "lr must not be negative"),
        ({"lr": "nan"}, "lr must be of type float, not 'nan'"),
    ],
)
def test_wrong_settings_are_named(assignments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_recipe("paper", assignments)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        build_recipe("papre", {})


def test_settings_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[head]\nroi_size = 8\n[train]\nlr = 1e-3\ndrops = [0.5]\n")
    recipe, fast = build_recipe("fast", {"lr": "2e-3"}, file), RECIPES["fast"]()
    assert (recipe.head.roi_size, recipe.train.lr, recipe.train.drops) == (8, 2e-3, (0.5,))
    assert (recipe.head.box_layers, recipe.train.steps) == (fast.head.box_layers, fast.train.steps)
    # A run's settings are all of its time: what came later stays off, whatever the recipe is now.
    document = {"recipe": "fast", "head": to_dict(fast.head), "train": to_dict(fast.train)}
    del document["head"]["fine_size"]
    run = tmp_path / "config.json"
    run.write_text(json.dumps({**document, "detector": {}, "run": "1"}))
    assert build_recipe("paper", {}, run).head.fine_size == HeadConfig().fine_size
    assert build_recipe("paper", {}, run).train == fast.train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[heads]\nroi_size = 8", "unknown key 'heads'; use recipe, head and train"),
        ("[head]\nroisize = 8", "unknown setting 'roisize'; did you mean 'roi_size'"),
        ("head = 8", "holds no settings"),
        ("{", "holds no settings"),
    ],
)
def test_wrong_files_of_settings_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"--config {file}.*{message}"):
        build_recipe("fast", {}, file)
    with pytest.raises(ConfigError, match="No such file"):
        build_recipe("fast", {}, tmp_path / "absent.toml")


def test_every_recipe_says_where_it_comes_from() -> None:
    for name, function in RECIPES.items():
        assert function().name == name
        assert function.__doc__


def test_readers_beside_a_gpu_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    chosen = TrainConfig()
    assert [chosen.reader_threads(on_gpu=g) for g in (False, True)] == [2, 8]
    assert TrainConfig(num_threads=3).reader_threads(on_gpu=True) == 3
    assert num_encoders(torch.device("cuda")) == 8
    assert num_encoders(torch.device("cpu")) == 1
    # Four processes of torchrun share the machine.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert chosen.reader_threads(on_gpu=True) == 2
    assert num_encoders(torch.device("cuda")) == 2
