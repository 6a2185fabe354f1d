import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mfdetr_pipelines import train_head as train_head_module
from mfdetr_pipelines.evaluate import EvaluateConfig, run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.recipes import Recipe, build_recipe
from mfdetr_pipelines.run_folder import TrainHeadConfig
from mfdetr_pipelines.train_head import loss_of_batch, run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors import registry
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import ConfigError, HeadError, IdentityError, StoppedError, TrainingError
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.protocols import SilentReporter
from mfdetr_cache.quantisation import StoredMap
from mfdetr_cache.training.batches import (
    TrainSample,
    collate,
    epoch_order,
    read_ahead,
    rows_of_step,
    view_of_epoch,
)
from mfdetr_cache.training.regions import build_regions
from mfdetr_cache.types import CachedImage
from tests.support import detectors, scenes

SMALL = {
    "hidden_dim": "16",
    "roi_size": "8",
    "steps": "4",
    "batch_size": "3",
    "min_match_iou": "0",
    "lr": "1e-3",
}


def small_recipe(name: str = "fast", **changes: Any) -> Recipe:
    return build_recipe(name, {**SMALL, **{k: str(v) for k, v in changes.items()}})


def train(cache: Path, out: Path, recipe: Recipe | None = None, **changes: Any) -> Any:
    config = TrainHeadConfig(cache, out, recipe or small_recipe(), **changes)
    return run_train_head(config, SilentReporter())


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_head(out).head.state_dict()


def test_trains_without_a_detector_and_twice_from_one_cache(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a detector was built")

    monkeypatch.setattr(registry, "load_detector", refuse)
    monkeypatch.setattr(registry, "load_huggingface_detector", refuse)
    for name in ("fast", "paper"):
        summary = train(drawn_cache, tmp_path / name, small_recipe(name))
        assert summary.steps == 4
        assert np.isfinite(summary.loss)
        lines = [
            json.loads(s) for s in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        assert lines[-1]["step"] == 4
        measured = run_evaluate(EvaluateConfig(drawn_cache, tmp_path / name), SilentReporter())
        assert 0 <= measured.mask.AP <= 1
        assert measured.num_images == 8


def test_the_loss_falls(tmp_path: Path, drawn_cache: Path) -> None:
    train(drawn_cache, tmp_path / "run", small_recipe(steps=60, batch_size=8, points="grid"))
    lines = [json.loads(s) for s in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


@pytest.mark.parametrize("stop_at", [1, 5])
def test_resumed_weights_are_bit_identical(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    recipe = small_recipe(steps=7, box_jitter=0.1, max_regions=1)
    train(drawn_cache, tmp_path / "whole", recipe)
    real = train_head_module._Training._step

    def stop(self: Any, batch: Any) -> None:
        real(self, batch)
        if self.step == stop_at:
            self._stop.set()

    monkeypatch.setattr(train_head_module._Training, "_step", stop)
    with pytest.raises(StoppedError, match=f"stopped by a signal at step {stop_at}; go on with"):
        train(drawn_cache, tmp_path / "parts", recipe)
    monkeypatch.undo()
    summary = train(drawn_cache, tmp_path / "parts", recipe, resume=True)
    assert summary.steps == 7
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_epochs_and_steps(tmp_path: Path, drawn_cache: Path) -> None:
    # 8 images in batches of 3: three steps an epoch.
    assert train(drawn_cache, tmp_path / "a", epochs=2).steps == 6
    assert train(drawn_cache, tmp_path / "b", max_steps=2).steps == 2
    with pytest.raises(ConfigError, match="not both"):
        train(drawn_cache, tmp_path / "c", epochs=1, max_steps=1)


def test_every_image_once_per_epoch() -> None:
    rows = list(range(10, 30))
    for epoch in range(2):
        seen = [r for s in range(3) for r in rows_of_step(rows, 8, 5, 3 * epoch + s)]
        assert sorted(seen) == rows
    assert (epoch_order(20, 5, 0) != epoch_order(20, 5, 1)).any()
    assert (epoch_order(20, 5, 0) != epoch_order(20, 6, 0)).any()


def test_reading_ahead_keeps_order_and_reports_errors() -> None:
    def load(row: int, step: int) -> Any:
        if row == 7:
            raise HeadError("row 7")
        return (row, step)

    steps = list(read_ahead(load, lambda s: [s, s + 1], range(3), 2))
    assert steps == [[(0, 0), (1, 0)], [(1, 1), (2, 1)], [(2, 2), (3, 2)]]
    with pytest.raises(HeadError, match="row 7"):
        list(read_ahead(load, lambda s: [s], range(9), 2))


def live_image(cached: CachedImage, output: Any) -> CachedImage:
    """The same image as the detector gives it now, nothing rounded."""
    return dataclasses.replace(
        cached,
        class_logits=output.class_logits[0].numpy(),
        boxes_cxcywh_norm=output.boxes_cxcywh_norm[0].numpy(),
        queries=output.queries[0].numpy(),
        maps={
            k: StoredMap.plain(v[0].permute(1, 2, 0).contiguous().numpy())
            for k, v in output.maps.items()
        },
    )


def test_a_step_from_the_cache_equals_a_step_from_the_live_detector(
    drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    """Loss and gradients agree to what rounding the inputs to float16 can change.

    The tolerance is measured, not guessed: rounding maps and queries to float16 moves each value by
    at most 2^-11 of itself. Random relative changes of exactly that size, applied to the live
    values, bound the first-order effect; the cached step must lie within four times the largest of
    five such random effects.
    """
    recipe = small_recipe("paper", points="grid", mask_scoring="false", steps=1)
    cache = FeatureCache.open(drawn_cache)
    detector = load_detector("hf", str(rtdetr_folder))
    cached = [cache[i] for i in range(4)]
    live = []
    for image in cached:
        path = scenes_folder / "images" / image.file_name
        picture = load_image(path, image.geometry.original_hw)
        live.append(live_image(image, detector.forward(detector.preprocess(picture)[None])))
    torch.manual_seed(0)
    head = MaskHead(recipe.head, cache.spec)

    def step(images: list[CachedImage]) -> tuple[float, torch.Tensor]:
        head.zero_grad()
        samples = [
            TrainSample(i, build_regions(i, recipe.train, 8, np.random.default_rng(0)))
            for i in images
        ]
        batch = collate(samples, head.map_names, torch.device("cpu"))
        assert len(batch.labels)
        losses = loss_of_batch(head, batch, recipe.train, 0)
        losses.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in head.parameters() if p.grad is not None])
        return losses.total.item(), gradient

    def perturbed(image: CachedImage, seed: int) -> CachedImage:
        random = np.random.default_rng(seed)

        def shake(values: Any) -> Any:
            signs = random.choice([-1.0, 1.0], values.shape).astype(np.float32)
            return (values * (1 + signs * 2.0**-11)).astype(np.float32)

        return dataclasses.replace(
            image,
            queries=shake(image.queries),
            maps={k: StoredMap.plain(shake(v.to_array())) for k, v in image.maps.items()},
        )

    live_loss, live_gradient = step(live)
    loss_bound, gradient_bound = 0.0, 0.0
    for seed in range(5):
        loss, gradient = step([perturbed(i, seed) for i in live])
        loss_bound = max(loss_bound, abs(loss - live_loss))
        gradient_bound = max(gradient_bound, float((gradient - live_gradient).norm()))
    cached_loss, cached_gradient = step(cached)
    assert abs(cached_loss - live_loss) <= 4 * loss_bound
    assert float((cached_gradient - live_gradient).norm()) <= 4 * gradient_bound
    # And the bound says something: it is far below the gradient itself.
    assert 4 * gradient_bound < 0.05 * float(live_gradient.norm())


def test_a_loss_that_is_not_finite_names_the_images(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_head_module.loss_of_batch

    def broken(*arguments: Any) -> Any:
        losses = real(*arguments)
        return dataclasses.replace(losses, total=losses.total * float("nan"))

    monkeypatch.setattr(train_head_module, "loss_of_batch", broken)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0; images \[1\d\d"):
        train(drawn_cache, tmp_path / "run")


def test_folders_in_use_are_not_touched(tmp_path: Path, drawn_cache: Path) -> None:
    train(drawn_cache, tmp_path / "run")
    before = (tmp_path / "run/head.safetensors").read_bytes()
    with pytest.raises(HeadError, match="is not empty; nothing was touched"):
        train(drawn_cache, tmp_path / "run")
    with pytest.raises(HeadError, match=r"cannot resume .*: train\.lr was 0\.001 and is 0\.5 now"):
        train(drawn_cache, tmp_path / "run", small_recipe(lr=0.5), resume=True)
    with pytest.raises(HeadError, match="holds no run to resume"):
        train(drawn_cache, tmp_path / "absent", resume=True)
    assert (tmp_path / "run/head.safetensors").read_bytes() == before
    (tmp_path / "run/checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(HeadError, match="checkpoint.pt is damaged"):
        train(drawn_cache, tmp_path / "run", resume=True)


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


def test_half_precision_trains_and_says_where_it_cannot(drawn_cache: Path, tmp_path: Path) -> None:
    whole = run_train_head(
        TrainHeadConfig(drawn_cache, tmp_path / "whole", small_recipe(), max_steps=2),
        SilentReporter(),
    )
    half = run_train_head(
        TrainHeadConfig(drawn_cache, tmp_path / "half", small_recipe(amp="bf16"), max_steps=2),
        SilentReporter(),
    )
    # bfloat16 has 8 bits: the loss of two steps moves by a few per cent at most, but it moves.
    assert half.loss != whole.loss
    assert half.loss == pytest.approx(whole.loss, rel=0.05)
    with pytest.raises(ConfigError, match="amp=fp16 needs a GPU"):
        run_train_head(
            TrainHeadConfig(drawn_cache, tmp_path / "fp16", small_recipe(amp="fp16")),
            SilentReporter(),
        )


def test_an_epoch_walks_through_the_views() -> None:
    """Every image once per epoch, in another view each time until all were shown."""
    views = ("base", "a", "b", "c")
    for row in range(20):
        shown = [view_of_epoch(views, 0, row, epoch) for epoch in range(8)]
        assert sorted(shown[:4]) == sorted(shown[4:]) == sorted(views)
    first = [view_of_epoch(views, 0, row, 0) for row in range(200)]
    # Views are mixed inside an epoch: about fifty images of each.
    assert all(30 < first.count(v) < 70 for v in views)
    assert first != [view_of_epoch(views, 1, row, 0) for row in range(200)]
