import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mfdetr_pipelines.cache.relabel import run_relabel
from mfdetr_pipelines.config.cache import RelabelConfig
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import (
    ConfigError,
    HeadError,
    IdentityError,
    StoppedError,
    TrainingError,
)
from mfdetr_cache.evaluation import measure as measure_module
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cache.training.regions import RegionSettings, build_regions
from mfdetr_cache.training.run_log import read_log
from tests.support import detectors, scenes
from tests.support.signals import stop_after
from tests.support.training import (
    same_weights,
    small_recipe,
    small_settings,
    train,
    weights_of,
)


def test_two_recipes_train_from_one_cache(tmp_path: Path, drawn_cache: Path) -> None:
    for name, fine_size in (("fast", 16), ("paper", 0)):
        chosen = small_recipe(name, fine_size=fine_size)
        summary = train(drawn_cache, tmp_path / name, chosen)
        assert summary.steps == 4
        assert np.isfinite(summary.loss)
        assert read_log(tmp_path / name)[-1]["step"] == 4
        measured = run_evaluate(EvaluateConfig(drawn_cache, tmp_path / name), SilentReporter())
        assert measured.num_images == 8


def test_it_is_told_where_no_detection_is_of_an_object(tmp_path: Path, drawn_cache: Path) -> None:
    reporter = SilentReporter()
    recipe = small_recipe(min_match_iou=0.99, steps=2)
    run_train_head(TrainHeadConfig(drawn_cache, tmp_path / "run", recipe), reporter)
    assert any("none of 2 steps had a detection that is one of" in m for m in reporter.messages)
    run_train_head(
        TrainHeadConfig(drawn_cache, tmp_path / "b", small_recipe()), quiet := SilentReporter()
    )
    assert not any("none of" in m for m in quiet.messages)


@pytest.mark.parametrize(
    "name",
    [
        "fcn",
        "pointrend",
        "pointrend_fast",
        "ffn",
        "queryinst",
        "istr",
        "istr_stages",
        "mask2former",
    ],
)
def test_other_papers_mask_branches_learn_from_the_same_cache(
    tmp_path: Path, drawn_cache: Path, name: str
) -> None:
    settings = {"hidden_dim": "16", "mask_embedding_dim": "8", "min_match_iou": "0", "steps": "8"}
    train(drawn_cache, tmp_path / "run", build_recipe(name, settings))
    lines = read_log(tmp_path / "run")
    assert np.isfinite(lines[-1]["bce"])
    measured = run_evaluate(EvaluateConfig(drawn_cache, tmp_path / "run"), SilentReporter())
    assert measured.num_images == 8


def test_training_from_a_cache_loads_no_detector(tmp_path: Path, drawn_cache: Path) -> None:
    """Neither the library of the detectors nor ours, also where the head is measured."""
    script = f"""
import sys
from pathlib import Path
from mfdetr_pipelines.config.train_head import TrainHeadConfig, Validation
from mfdetr_pipelines.train_head import run_train_head
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.recipes import build_recipe
cache = Path({str(drawn_cache)!r})
recipe = build_recipe("fast", {small_settings(steps=1)!r})
out = Path({str(tmp_path / "run")!r})
config = TrainHeadConfig(cache, out, recipe, validation=Validation(cache))
run_train_head(config, SilentReporter())
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "mfdetr_cache.training.loop" in loaded
    assert "mfdetr_cache.evaluation.measure" in loaded
    unwanted = ("transformers", "mfdetr_cache.detectors", "mfdetr_cache.extraction")
    assert not [name for name in loaded if name.startswith(unwanted)]


def test_the_loss_falls(tmp_path: Path, drawn_cache: Path) -> None:
    train(drawn_cache, tmp_path / "run", small_recipe(steps=60, batch_size=8, points="grid"))
    lines = [json.loads(s) for s in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_epochs_and_steps(tmp_path: Path, drawn_cache: Path) -> None:
    # 8 images in batches of 3: three steps an epoch.
    assert train(drawn_cache, tmp_path / "a", epochs=2).steps == 6
    assert train(drawn_cache, tmp_path / "b", max_steps=2).steps == 2
    with pytest.raises(ConfigError, match="not both"):
        train(drawn_cache, tmp_path / "c", epochs=1, max_steps=1)


def test_nothing_to_learn_from_is_one_clear_line(tmp_path: Path, rtdetr_folder: Path) -> None:
    folder = tmp_path / "crowds"
    document = scenes.write_scenes(folder, count=2, seed=0)
    for annotation in document["annotations"]:
        annotation["iscrowd"] = 1
    scenes.save_annotations(folder, document)
    cache = tmp_path / "crowds.zarr"
    run_extract(scenes.extract_config(folder, str(rtdetr_folder), cache), SilentReporter())
    with pytest.raises(TrainingError, match="has an object to learn from"):
        train(cache, tmp_path / "run")


def test_caches_of_different_detectors_are_refused(
    tmp_path: Path, scenes_folder: Path, drawn_cache: Path
) -> None:
    detectors.save_rtdetr(tmp_path / "other", seed=9)
    other = tmp_path / "other.zarr"
    config = scenes.extract_config(scenes_folder, str(tmp_path / "other"), other)
    run_extract(config, SilentReporter())
    with pytest.raises(IdentityError, match="come from different detectors: weights_sha256 is"):
        train(drawn_cache, tmp_path / "run", val_cache=other)
    assert not (tmp_path / "run").exists()
    train(drawn_cache, tmp_path / "run", max_steps=1)
    with pytest.raises(IdentityError, match=r"head .* and cache .* come from different detectors"):
        run_evaluate(EvaluateConfig(other, tmp_path / "run"), SilentReporter())


def test_validation_on_the_way_keeps_the_best_weights(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path
) -> None:
    out = tmp_path / "run"
    plain = train(drawn_cache, tmp_path / "plain", small_recipe(steps=6))
    summary = train(drawn_cache, out, small_recipe(steps=6), val_cache=drawn_cache, val_every=2)
    # Looking does not change what is learned.
    assert plain.loss == summary.loss
    assert same_weights(out, tmp_path / "plain")
    lines = [json.loads(s) for s in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {s["step"]: s["validation"]["mask"]["AP"] for s in lines if "validation" in s}
    assert sorted(measured) == [2, 4, 6]
    assert summary.best_AP == max(measured.values()) == measured[summary.best_step]
    best = load_head(out, "best").head.state_dict()
    assert best.keys() == weights_of(out).keys()
    with pytest.raises(HeadError, match="has no head-best.safetensors: it was trained without"):
        load_head(tmp_path / "plain", "best")
    with pytest.raises(ConfigError, match="--val-every needs --val-cache"):
        train(drawn_cache, tmp_path / "other", val_every=2)


def test_numbers_reach_tensorboard_and_missing_trackers_are_named(
    tmp_path: Path, drawn_cache: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(drawn_cache, tmp_path / "run", small_recipe(steps=10))
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert events.Scalars("loss")[-1].step == line["step"] == 10
    assert events.Scalars("loss")[-1].value == pytest.approx(line["loss"], rel=1e-6)
    with pytest.raises(ConfigError, match="--track mlflow: the package is not installed; pip inst"):
        train(drawn_cache, tmp_path / "other", track=("mlflow",))
    with pytest.raises(ConfigError, match="--track tensorbord: unknown; use tensorboard, wandb"):
        train(drawn_cache, tmp_path / "other", track=("tensorbord",))
    assert not (tmp_path / "other").exists()


def test_mask_codes_get_their_basis_from_the_masks_that_may_be_seen(
    tmp_path: Path, drawn_cache: Path
) -> None:
    recipe = small_recipe("istr", mask_embedding_dim=12)
    train(drawn_cache, tmp_path / "all", recipe)
    basis = load_head(tmp_path / "all").head.codec.basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(12), atol=1e-5, rtol=0)
    other_seed = small_recipe("istr", mask_embedding_dim=12, seed=3)
    train(drawn_cache, tmp_path / "seed", other_seed)
    assert torch.equal(load_head(tmp_path / "seed").head.codec.basis, basis)
    part = small_recipe("istr", mask_embedding_dim=12, label_fraction=0.4)
    train(drawn_cache, tmp_path / "part", part)
    assert not torch.allclose(load_head(tmp_path / "part").head.codec.basis, basis, atol=1e-2)


def test_held_out_categories_are_never_trained_on(tmp_path: Path, drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    names = {str(c["name"]): int(c["id"]) for c in cache.categories}
    hidden, number = next(iter(names.items()))
    summary = train(drawn_cache, tmp_path / "run", hold_out=(hidden,))
    assert summary.steps == 4
    document = json.loads((tmp_path / "run/config.json").read_text())
    assert document["train"]["held_out"] == [number]
    seen = dataclasses.replace(small_recipe().train, held_out=(number,), max_regions=0)
    settings = RegionSettings.of(seen, small_recipe().head)
    label_of = {c: label for label, c in enumerate(cache.label_categories) if c >= 0}
    for row in cache.rows:
        regions = build_regions(cache.read(row, ()), settings, np.random.default_rng(0))
        assert label_of[number] not in regions.labels
    found = run_evaluate(EvaluateConfig(drawn_cache, tmp_path / "run"), SilentReporter())
    by_id = {c["category_id"]: c["AP"] for c in found.details["mask"]["categories"]}
    assert found.details["held_out"]["unseen_AP"] == by_id[number]
    others = [ap for c, ap in by_id.items() if c != number and ap >= 0]
    assert found.details["held_out"]["seen_AP"] == pytest.approx(np.mean(others))
    with pytest.raises(ConfigError, match="--hold-out elipse: no such category; did you mean"):
        train(drawn_cache, tmp_path / "other", hold_out=("elipse",))
    with pytest.raises(ConfigError, match="--hold-out ²: no such category"):
        train(drawn_cache, tmp_path / "other", hold_out=("²",))


def test_a_stopped_run_is_measured_at_its_step(tmp_path: Path, drawn_cache: Path) -> None:
    out, whole, reporter = tmp_path / "run", tmp_path / "whole", SilentReporter()
    with pytest.raises(StoppedError, match="at step 3"):
        train(drawn_cache, out, small_recipe(steps=6), stop_after(3))
    run_evaluate(EvaluateConfig(drawn_cache, out), reporter)
    assert f"warning: {out} is of step 3 of 6: its training was not ended" in reporter.messages
    train(drawn_cache, out, small_recipe(steps=6), resume=True)
    train(drawn_cache, whole, small_recipe(steps=6))
    assert load_head(out).unfinished == ""
    assert same_weights(out, whole)


def measure_as(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Give these mask APs, one measurement after the other."""
    real, left = measure_module.measure, iter(values)

    def scripted(*arguments: Any, **options: Any) -> Any:
        found, masks = real(*arguments, **options)
        return dataclasses.replace(
            found, mask=dataclasses.replace(found.mask, AP=next(left))
        ), masks

    monkeypatch.setattr(measure_module, "measure", scripted)


def test_the_best_weights_survive_a_stop(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worse validation after a resume does not replace a better one before it."""
    measure_as(monkeypatch, 0.5, 0.1, 0.2)
    recipe, out = small_recipe(steps=6), tmp_path / "run"
    with pytest.raises(StoppedError, match="at step 3"):
        train(drawn_cache, out, recipe, stop_after(3), val_cache=drawn_cache, val_every=2)
    best = (out / "head-best.safetensors").read_bytes()
    summary = train(drawn_cache, out, recipe, val_cache=drawn_cache, val_every=2, resume=True)
    assert (summary.best_AP, summary.best_step) == (0.5, 2)
    assert (out / "head-best.safetensors").read_bytes() == best


def test_measurements_on_other_annotations_are_no_better(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is easier to reach elsewhere does not keep the best weights from being saved."""
    measure_as(monkeypatch, 0.5, 0.1, 0.2)
    recipe, out = small_recipe(steps=6), tmp_path / "run"
    with pytest.raises(StoppedError, match="at step 3"):
        train(drawn_cache, out, recipe, stop_after(3), val_cache=drawn_cache, val_every=2)
    document = scenes.load_annotations(scenes_folder)
    del document["annotations"][0]
    other = shutil.copytree(drawn_cache, tmp_path / "c.zarr")
    annotations = scenes.save_annotations(tmp_path, document)
    run_relabel(RelabelConfig(str(other), annotations), SilentReporter())
    with pytest.warns(RuntimeWarning, match="was measured on other images or annotations before"):
        summary = train(drawn_cache, out, recipe, val_cache=other, val_every=2, resume=True)
    assert (summary.best_AP, summary.best_step) == (0.2, 6)


def test_a_training_that_gets_no_better_stops(
    drawn_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = (0.1, 0.5, 0.4, 0.5)
    recipe, out = small_recipe(steps=9), tmp_path / "run"
    options = {"val_cache": drawn_cache, "val_every": 1, "early_stop": 2}
    measure_as(monkeypatch, *values, values[-1])
    summary = train(drawn_cache, out, recipe, **options)
    assert (summary.steps, summary.best_step) == (4, 2)
    # It is at its end, and what is written says so.
    assert load_head(out).unfinished == ""
    assert ">mask AP<" in (out / "curves.svg").read_text()
    # Stopped by a signal between the two, it counts on.
    resumed = tmp_path / "resumed"
    monkeypatch.undo()
    measure_as(monkeypatch, *values, values[-1])
    with pytest.raises(StoppedError, match="at step 3"):
        train(drawn_cache, resumed, recipe, stop_after(3), **options)
    assert train(drawn_cache, resumed, recipe, **options, resume=True).steps == 4
    assert same_weights(resumed, out)
    with pytest.raises(ConfigError, match="--early-stop counts measurements"):
        train(drawn_cache, tmp_path / "other", early_stop=2)


def test_a_part_of_the_cache_serves_as_validation(drawn_cache: Path, tmp_path: Path) -> None:
    """For those who have one set of images only; --val-every keeps the best weights on it."""
    out = tmp_path / "run"
    summary = train(drawn_cache, out, small_recipe(steps=4, val_split=4), val_every=2)
    assert summary.validation is not None
    assert summary.validation.num_images == 2
    assert summary.best_step in (2, 4)
    reporter = SilentReporter()
    alone = run_evaluate(EvaluateConfig(drawn_cache, out), reporter)
    assert alone.mask == summary.validation.mask
    # Of a head that saw all of them, the number means little.
    train(drawn_cache, tmp_path / "all")
    run_evaluate(EvaluateConfig(drawn_cache, tmp_path / "all"), reporter)
    assert "was trained on the images of" in reporter.messages[-1]
    with pytest.raises(ConfigError, match=r"--val-every needs --val-cache, or --set val_split=N"):
        train(drawn_cache, tmp_path / "none", val_every=2)


def test_time_spent_validating_is_not_time_spent_training(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measure_module.measure
    monkeypatch.setattr(measure_module, "measure", lambda *a: time.sleep(0.5) or real(*a))
    started = time.perf_counter()
    summary = train(drawn_cache, tmp_path / "run", val_cache=drawn_cache, val_every=1)
    assert summary.seconds < time.perf_counter() - started - 4 * 0.5


def test_what_is_not_augmented_is_said(drawn_cache: Path, tmp_path: Path) -> None:
    reporter = SilentReporter()
    settings = TrainHeadConfig(drawn_cache, tmp_path / "run", small_recipe(steps=1))
    run_train_head(settings, reporter)
    assert any("not augmented: it sees one view of each" in m for m in reporter.messages)
    with pytest.raises(ConfigError, match="views=2: the cache has 1; extract one with --views 1"):
        train(drawn_cache, tmp_path / "b", small_recipe(views="2"))
    assert not (tmp_path / "b" / "config.json").exists()
