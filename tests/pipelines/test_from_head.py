"""A training that starts from the weights of another head."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig, Validation
from mfdetr_pipelines.config.train_joint import TrainJointConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head
from mfdetr_pipelines.train_joint import run_train_joint
from PIL import Image

from mfdetr_cache.errors import HeadError, TrainingError
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.recipes import build_recipe
from tests.support import scenes
from tests.support.scenes import extract_config
from tests.support.training import weights_of

# A step of Muon is as long as its learning rate, whatever the gradient: this one is no step.
STILL = {"lr": "1e-9", "weight_decay": "0"}
SMALL = {
    "hidden_dim": "16",
    "roi_size": "8",
    "fine_size": "0",
    "steps": "2",
    "min_match_iou": "0",
}


def train(cache: Path, out: Path, from_head: Path | None = None, **changes: Any) -> Path:
    """Two steps of a small head; returns its folder."""
    resume = changes.pop("resume", False)
    settings = {**SMALL, **{k: str(v) for k, v in changes.items()}}
    config = TrainHeadConfig(cache, out, build_recipe("fast", settings))
    run_train_head(replace(config, from_head=from_head, resume=resume), SilentReporter())
    return out


def test_it_starts_there_and_the_run_knows(tmp_path: Path, drawn_cache: Path) -> None:
    first = train(drawn_cache, tmp_path / "first")
    fresh = train(drawn_cache, tmp_path / "fresh", seed=1, **STILL)
    second = train(drawn_cache, tmp_path / "second", first, seed=1, **STILL)
    before, after, other = (weights_of(run) for run in (first, second, fresh))
    for name, weight in before.items():
        assert torch.allclose(weight, after[name], atol=1e-6), name
    assert not all(torch.allclose(w, other[name], atol=1e-3) for name, w in before.items())
    run = load_head(second).run
    assert run.initial == load_head(first).as_initial
    assert run.run != load_head(fresh).run.run


def test_a_run_is_resumed_with_the_same_start_only(tmp_path: Path, drawn_cache: Path) -> None:
    first = train(drawn_cache, tmp_path / "first")
    second = train(drawn_cache, tmp_path / "second", first)
    train(drawn_cache, second, first, resume=True)
    with pytest.raises(HeadError, match=r"cannot resume .*: initial was .* and is None"):
        train(drawn_cache, second, resume=True)


def test_another_architecture_is_refused(tmp_path: Path, drawn_cache: Path) -> None:
    first = train(drawn_cache, tmp_path / "first")
    with pytest.raises(HeadError, match="box_layers is 4 there and 1 here; give its settings, as"):
        train(drawn_cache, tmp_path / "second", first, box_layers=1)
    assert not (tmp_path / "second").exists()


def test_nothing_is_measured_on_images_that_the_start_has_learned_from(
    tmp_path: Path, drawn_cache: Path
) -> None:
    first = train(drawn_cache, tmp_path / "first")
    with pytest.raises(TrainingError, match=f"--from-head {first} has learned from images of"):
        train(drawn_cache, tmp_path / "second", first, val_split=3)
    split = train(drawn_cache, tmp_path / "split", val_split=3)
    train(drawn_cache, tmp_path / "third", split, val_split=3)


def test_evaluate_knows_what_the_start_has_learned_from(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    other = tmp_path / "other.zarr"
    run_extract(extract_config(scenes_folder, str(rtdetr_folder), other, limit=5), SilentReporter())
    second = train(other, tmp_path / "second", train(drawn_cache, tmp_path / "first"))
    for cache in (drawn_cache, other):
        reporter = SilentReporter()
        run_evaluate(EvaluateConfig(str(cache), second), reporter)
        assert any("no validation" in message for message in reporter.messages)


def test_evaluate_knows_images_of_another_cache_that_were_learned_from(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    """An image that is in both, another one under the name of one in both, and a renamed one."""
    folder = tmp_path / "scenes"
    shutil.copytree(scenes_folder, folder)
    _, second, third = sorted((folder / "images").iterdir())[:3]
    with Image.open(second) as image:
        other_image = Image.effect_noise(image.size, 90).convert("RGB")
    other_image.save(second)
    document = scenes.load_annotations(folder)
    document["images"][2]["file_name"] = third.rename(third.with_name("renamed.png")).name
    document["images"] = document["images"][2:] + document["images"][:2]
    scenes.save_annotations(folder, document)
    others = [tmp_path / "other.zarr", tmp_path / "all.zarr"]
    config = TrainHeadConfig(drawn_cache, tmp_path / "head", build_recipe("fast", SMALL))
    for other, limit in zip(others, (1, None), strict=True):
        extract = extract_config(folder, str(rtdetr_folder), other, limit=limit)
        run_extract(extract, SilentReporter())
    reporter = SilentReporter()
    run_train_head(replace(config, validation=Validation(val_cache=others[0])), reporter)
    run_evaluate(EvaluateConfig(str(others[1]), config.out), reporter)
    one, all_but_one = [m for m in reporter.messages if "no validation" in m]
    assert f"warning: 1 of 1 images of {others[0]} are also in {drawn_cache}" in one
    assert f"such as renamed.png ({third.name} there):" in one
    total = len(document["images"])
    assert f"{total - 1} of {total} images of {others[1]} are also in {drawn_cache}" in all_but_one


def test_a_joint_training_starts_there_too(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    first = train(drawn_cache, tmp_path / "first")
    recipe = build_recipe("fast", {**SMALL, **STILL})
    run_train_joint(
        TrainJointConfig(
            weights=str(rtdetr_folder),
            images=scenes_folder / "images",
            annotations=scenes_folder / "instances.json",
            out=tmp_path / "joint",
            recipe=recipe,
            tune="nothing",
            from_head=first,
        ),
        SilentReporter(),
    )
    after = weights_of(tmp_path / "joint")
    for name, weight in weights_of(first).items():
        assert torch.allclose(weight, after[name], atol=1e-6), name
    assert load_head(tmp_path / "joint").run.initial == load_head(first).as_initial
