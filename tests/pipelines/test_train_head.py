import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import (
    CacheError,
    ConfigError,
    HeadError,
    IdentityError,
    OutputError,
    StoppedError,
    TrainingError,
)
from mfdetr_cache.evaluation import measure as measure_module
from mfdetr_cache.evaluation.detections import detections_of
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.ops.quantisation import StoredMap
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training import learner as learner_module
from mfdetr_cache.training.checkpoint import load_checkpoint, save_checkpoint
from mfdetr_cache.training.config import Length
from mfdetr_cache.training.distributed import split
from mfdetr_cache.training.input.loader import CacheSource
from mfdetr_cache.training.input.threads import read_in_threads
from mfdetr_cache.training.learner import Learner, build_learner, loss_of_batch
from mfdetr_cache.training.loop import TrainingLoop
from mfdetr_cache.training.order import (
    Order,
    epoch_order,
    epoch_order_by_parts,
    view_of_epoch,
)
from mfdetr_cache.training.recipes import Recipe, build_recipe
from mfdetr_cache.training.regions import RegionSettings, build_regions
from mfdetr_cache.training.run import Run
from mfdetr_cache.training.run_log import RunLog, read_log
from mfdetr_cache.types import CachedImage
from tests.support import detectors, scenes
from tests.support.batches import batch_of
from tests.support.configs import changed
from tests.support.signals import stop_after

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


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_head(out).head.state_dict()


def test_two_recipes_train_from_one_cache(tmp_path: Path, drawn_cache: Path) -> None:
    for name, fine_size in (("fast", 16), ("paper", 0)):
        chosen = small_recipe(name, fine_size=fine_size)
        summary = train(drawn_cache, tmp_path / name, chosen)
        assert summary.steps == 4
        assert np.isfinite(summary.loss)
        assert read_log(tmp_path / name)[-1]["step"] == 4
        measured = run_evaluate(EvaluateConfig(drawn_cache, tmp_path / name), SilentReporter())
        assert measured.num_images == 8


@pytest.mark.parametrize(
    "name", ["fcn", "pointrend", "pointrend_fast", "ffn", "queryinst", "istr", "mask2former"]
)
def test_other_papers_mask_branches_learn_from_the_same_cache(
    tmp_path: Path, drawn_cache: Path, name: str
) -> None:
    settings = {"hidden_dim": "16", "mask_embedding_dim": "8", "min_match_iou": "0", "steps": "8"}
    train(drawn_cache, tmp_path / "run", build_recipe(name, settings))
    lines = read_log(tmp_path / "run")
    assert np.isfinite(lines[-1]["bce"])
    measured = run_evaluate(EvaluateConfig(drawn_cache, tmp_path / "run"), SilentReporter())
    assert 0 <= measured.mask.AP <= 1


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


@pytest.mark.parametrize(("stop_at", "optimiser"), [(1, "adamw"), (5, "adamw"), (5, "muon")])
def test_resumed_weights_are_bit_identical(
    tmp_path: Path,
    drawn_cache: Path,
    stop_at: int,
    optimiser: str,
) -> None:
    recipe = small_recipe(steps=7, box_jitter=0.1, max_regions=1, optimiser=optimiser)
    train(drawn_cache, tmp_path / "whole", recipe)
    with pytest.raises(StoppedError, match=f"stopped by a signal at step {stop_at}; go on with"):
        train(drawn_cache, tmp_path / "parts", recipe, on_step=stop_after(stop_at))
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
    order = Order(tuple(range(10, 30)), 8, 5)
    assert order.steps_per_epoch == 3
    for epoch in range(2):
        seen = [row for s in range(3) for row in order.rows_of(3 * epoch + s)]
        assert sorted(seen) == list(order.rows)
    assert (epoch_order(20, 5, 0) != epoch_order(20, 5, 1)).any()
    assert (epoch_order(20, 5, 0) != epoch_order(20, 6, 0)).any()


def test_reading_ahead_keeps_order_and_reports_errors() -> None:
    def load(row: int, step: int) -> Any:
        if row == 7:
            raise HeadError("row 7")
        return (row, step)

    steps = list(read_in_threads(load, lambda s: [s, s + 1], range(3), 2))
    assert steps == [[(0, 0), (1, 0)], [(1, 1), (2, 1)], [(2, 2), (3, 2)]]
    with pytest.raises(HeadError, match="row 7"):
        list(read_in_threads(load, lambda s: [s], range(9), 2))


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
    head = build_head(recipe.head, cache.spec)

    def step(images: list[CachedImage]) -> tuple[float, torch.Tensor]:
        head.zero_grad()
        batch = batch_of(images, head, recipe.train)
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
    real = learner_module.loss_of_batch

    def broken(*arguments: Any) -> Any:
        losses = real(*arguments)
        return dataclasses.replace(losses, total=losses.total * float("nan"))

    monkeypatch.setattr(learner_module, "loss_of_batch", broken)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0; images \[1\d\d"):
        train(drawn_cache, tmp_path / "run")


def broken_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = learner_module.loss_of_batch

    def broken(head: Any, batch: Any, train: Any, now: int, *rest: Any) -> Any:
        losses = real(head, batch, train, now, *rest)
        factor = float("nan") if now >= step else 1.0
        return dataclasses.replace(losses, total=losses.total * factor)

    monkeypatch.setattr(learner_module, "loss_of_batch", broken)


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_from_before(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, often = tmp_path / "run", small_recipe(steps=6, checkpoint_minutes=0.0)
    with monkeypatch.context() as during:
        broken_from(3, during)
        with pytest.raises(TrainingError, match="step 3 is kept: --resume goes on from it, also"):
            train(drawn_cache, out, often)
    assert load_checkpoint(out)["step"] == 3
    assert (out / "failed.pt").is_file()
    with pytest.raises(HeadError, match=r"train\.batch_size was 3 and is 2 now"):
        train(drawn_cache, out, small_recipe(steps=6, batch_size=2), resume=True)
    train(drawn_cache, out, small_recipe(steps=6, lr=1e-4, checkpoint_minutes=0.0), resume=True)
    record = load_head(out).run
    assert record.train["lr"] == 1e-4
    assert [before["lr"] for before in record.before] == [1e-3]
    # What failed is over: from now on it is a run with these settings.
    assert not (out / "failed.pt").exists()
    with pytest.raises(HeadError, match=r"train\.lr was 0\.0001 and is 0\.01 now"):
        train(drawn_cache, out, small_recipe(steps=6, lr=1e-2), resume=True)


def test_weights_that_are_not_finite_are_no_checkpoint_and_no_head(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient can be infinite where the loss is not; the last step has no step after it."""
    real = Learner._average_weights

    def broken(learner: Learner) -> None:
        if learner.step == 3:
            next(learner.head.parameters()).data.fill_(float("inf"))
        real(learner)

    monkeypatch.setattr(Learner, "_average_weights", broken)
    with pytest.raises(TrainingError, match="weights are not finite after step 4; no checkpoint"):
        train(drawn_cache, tmp_path / "run")
    assert not (tmp_path / "run/checkpoint.pt").exists()
    assert not (tmp_path / "run/head.safetensors").exists()


def test_what_was_learned_is_saved_when_the_cache_cannot_be_read_any_more(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is gone, or a reader that was killed, whatever the error."""
    train(drawn_cache, tmp_path / "reference", small_recipe(steps=9))
    real = CacheSource.steps

    def failing(source: CacheSource, numbers: range) -> Iterator[Any]:
        steps = real(source, numbers)
        with contextlib.closing(steps):
            yield from itertools.islice(steps, 5)
            raise CacheError("the store is gone")

    out, recipe = tmp_path / "run", small_recipe(steps=9)
    with monkeypatch.context() as during:
        during.setattr(CacheSource, "steps", failing)
        with pytest.raises(CacheError, match="^the store is gone$"):
            train(drawn_cache, out, recipe)
    assert load_checkpoint(out)["step"] == 5
    train(drawn_cache, out, recipe, resume=True)
    reference = weights_of(tmp_path / "reference")
    assert all(torch.equal(v, reference[k]) for k, v in weights_of(out).items())


def test_a_run_folder_has_one_writer(tmp_path: Path, drawn_cache: Path) -> None:
    out = tmp_path / "run"
    second: list[str] = []

    def also(_step: int) -> None:
        for resume in (False, True):
            with pytest.raises(HeadError) as caught:
                train(drawn_cache, out, resume=resume)
            second.append(str(caught.value))

    train(drawn_cache, out, small_recipe(steps=1), on_step=also)
    said = f"{out} is being written by another process; wait for it, or another --out"
    assert second == [said, said]
    # What a kill during the creation of the folder leaves is nobody's run.
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json.partial").write_text("{")
    with pytest.raises(HeadError, match="holds no run to resume; leave --resume out"):
        train(drawn_cache, half, small_recipe(steps=1), resume=True)
    train(drawn_cache, half, small_recipe(steps=1))
    # Nothing is put into a folder of something else.
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("")
    with pytest.raises(HeadError, match="is not empty; nothing was touched"):
        train(drawn_cache, photos)
    assert [p.name for p in photos.iterdir()] == ["cat.jpg"]


def test_folders_in_use_are_not_touched(tmp_path: Path, drawn_cache: Path) -> None:
    train(drawn_cache, tmp_path / "run")
    before = (tmp_path / "run/head.safetensors").read_bytes()
    with pytest.raises(HeadError, match="is not empty; nothing was touched"):
        train(drawn_cache, tmp_path / "run")
    with pytest.raises(HeadError, match=r"cannot resume .*: train\.lr was 0\.001 and is 0\.5 now"):
        train(drawn_cache, tmp_path / "run", small_recipe(lr=0.5), resume=True)
    # How many threads read is no part of what a run is.
    train(drawn_cache, tmp_path / "run", small_recipe(num_threads=3), resume=True)
    assert (tmp_path / "run/head.safetensors").read_bytes() == before
    with pytest.raises(HeadError, match="holds no run to resume"):
        train(drawn_cache, tmp_path / "absent", resume=True)
    assert (tmp_path / "run/head.safetensors").read_bytes() == before
    (tmp_path / "run/checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(HeadError, match="checkpoint.pt is damaged"):
        train(drawn_cache, tmp_path / "run", resume=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_does_not_end_a_training(tmp_path: Path, drawn_cache: Path) -> None:
    """Every file of the run finds no room for a while; nothing but time is lost."""
    folder, reference = tmp_path / "run", tmp_path / "reference"
    settings = {"steps": 20, "checkpoint_minutes": 0.0}
    train(drawn_cache, reference, small_recipe(**settings))
    reporter = SilentReporter()

    def fill_the_disk(done: int) -> None:
        if done == 8:
            (folder / "checkpoint.pt.partial").symlink_to("/dev/full")
            (folder / "metrics.jsonl").symlink_to("/dev/full")
        if done == 15:
            (folder / "metrics.jsonl").unlink()

    config = TrainHeadConfig(drawn_cache, folder, small_recipe(**settings), device="cpu")
    with pytest.warns(UserWarning, match="metrics.jsonl cannot be written, the disk is full"):
        run_train_head(config, reporter, fill_the_disk)
    (warning,) = [m for m in reporter.messages if m.startswith("warning")]
    assert "checkpoint.pt cannot be written, the disk is full" in warning
    assert [line["step"] for line in read_log(folder)] == [10, 20]
    assert load_checkpoint(folder)["step"] == 20
    for name in ("head.safetensors", "config.json"):
        assert (folder / name).is_file()
    expected = weights_of(reference)
    assert all(torch.equal(w, expected[k]) for k, w in weights_of(folder).items())

    # At the very end it is an error; where there is room again, --resume only has to write.
    (folder / "head.safetensors").unlink()
    (folder / "head.safetensors.partial").symlink_to("/dev/full")
    again = dataclasses.replace(config, resume=True)
    with pytest.raises(OutputError, match="head.safetensors cannot be written, the disk is full"):
        run_train_head(again, reporter)
    run_train_head(again, reporter)
    assert (folder / "head.safetensors").is_file()


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
        TrainHeadConfig(drawn_cache, tmp_path / "whole", small_recipe(), length=Length(2)),
        SilentReporter(),
    )
    half = run_train_head(
        TrainHeadConfig(drawn_cache, tmp_path / "half", small_recipe(amp="bf16"), length=Length(2)),
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


def test_parts_are_mixed_and_every_image_comes_once() -> None:
    """Forty parts of fifty rows: neighbours in time come from eight parts, evenly."""
    parts = tuple(row // 50 for row in range(2000))
    order = epoch_order_by_parts(parts, 0, 0)
    assert sorted(order) == list(range(2000))
    assert (order != epoch_order_by_parts(parts, 0, 1)).any()
    window = np.array(parts)[order[:400]]
    assert len(np.unique(window)) == 8
    # Mixed inside the window: the first half of it already holds about half of each part
    # (hypergeometric, standard deviation 3.3; six of them).
    counts = np.array([(window[:200] == p).sum() for p in np.unique(window)])
    assert (abs(counts - 25) < 20).all()
    runs = int((np.diff(window) == 0).sum())
    # In a random order one neighbour in eight is of the same part.
    assert runs < 100


@pytest.mark.parametrize("name", ["fast", "paper"])
def test_a_step_in_pieces_has_the_losses_and_gradients_of_a_whole_one(
    drawn_cache: Path, name: str
) -> None:
    """In float64, where the order of a sum changes nothing that could be seen at 1e-10."""
    recipe = small_recipe(name)
    cache = FeatureCache.open(drawn_cache)
    torch.manual_seed(0)
    head = build_head(recipe.head, cache.spec)
    images = [cache[i] for i in range(6)]
    whole_batch = batch_of(images, head, recipe.train)

    def gradients(parts: list[Any]) -> tuple[float, torch.Tensor]:
        head.zero_grad()
        total, place, loss = len(whole_batch.labels), 0, 0.0
        for part in parts:
            batch = batch_of(part, head, recipe.train)
            count = len(batch.labels)
            if not count:
                continue
            losses = loss_of_batch(head, batch, recipe.train, 3, (place, total))
            losses.total.backward()
            loss += losses.total.item()
            place += count
        assert place == total
        return loss, torch.cat([p.grad.flatten() for p in head.parameters() if p.grad is not None])

    whole_loss, whole = gradients([images])
    loss, gradient = gradients(split(images, 4))
    # float32: 24 bits, sums of some thousand terms in another order.
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert float((gradient - whole).norm()) < 1e-4 * float(whole.norm())
    plain = loss_of_batch(head, whole_batch, recipe.train, 3)
    assert plain.total.item() == pytest.approx(whole_loss, rel=1e-6)


def test_a_gpu_that_is_full_splits_the_step_or_says_so(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With auto, the step is computed in more pieces and nothing else changes."""
    real = learner_module.Learner.learn

    def small_memory(self: Any, pieces: Any, *arguments: Any) -> Any:
        if max(len(p.image_ids) for p in pieces) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pieces, *arguments)

    monkeypatch.setattr(learner_module.Learner, "learn", small_memory)
    with pytest.raises(TrainingError, match="does not hold 3 images .*--batch-size auto"):
        train(drawn_cache, tmp_path / "full")
    split_run = train(drawn_cache, tmp_path / "split", batch_size="auto")
    monkeypatch.undo()
    whole = train(drawn_cache, tmp_path / "whole")
    assert split_run.steps == whole.steps == 4
    assert split_run.loss == pytest.approx(whole.loss, rel=1e-4)


def test_validation_on_the_way_keeps_the_best_weights(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path
) -> None:
    out = tmp_path / "run"
    plain = train(drawn_cache, tmp_path / "plain", small_recipe(steps=6))
    summary = train(drawn_cache, out, small_recipe(steps=6), val_cache=drawn_cache, val_every=2)
    # Looking does not change what is learned.
    assert plain.loss == summary.loss
    last, before = weights_of(out), weights_of(tmp_path / "plain")
    assert all(torch.equal(last[k], before[k]) for k in last)
    lines = [json.loads(s) for s in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {s["step"]: s["validation"]["mask"]["AP"] for s in lines if "validation" in s}
    assert sorted(measured) == [2, 4, 6]
    assert summary.best_AP == max(measured.values()) == measured[summary.best_step]
    best = load_head(out, "best").head.state_dict()
    assert best.keys() == last.keys()
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


def test_heads_side_by_side_end_with_the_weights_of_heads_alone(
    tmp_path: Path, drawn_cache: Path
) -> None:
    """Bit for bit, with other widths, grids, lengths and maps beside them."""
    recipes = {
        "a": small_recipe(steps=5),
        "b": small_recipe(steps=3, hidden_dim=24, lr=5e-3),
        "c": small_recipe("paper", steps=5, roi_size=16, use_c1="false", box_block="convnext"),
        "d": small_recipe(steps=2, query_o2o="true"),
    }
    cache = FeatureCache.open(drawn_cache)
    runs = {}
    for name, recipe in recipes.items():
        train(drawn_cache, tmp_path / name, recipe)
        learner = build_learner(
            recipe.train, lambda r=recipe: build_head(r.head, cache.spec), torch.device("cpu")
        )
        runs[name] = Run(learner, tmp_path / "side", RunLog(tmp_path))
    (tmp_path / "side").mkdir()
    source = CacheSource(cache, [run.learner for run in runs.values()])
    TrainingLoop(source, list(runs.values()), SilentReporter()).run()
    for name, run in runs.items():
        alone, beside = weights_of(tmp_path / name), run.learner.result_weights()
        assert run.learner.step == recipes[name].train.steps
        assert all(torch.equal(alone[k], beside[k]) for k in alone), name


def test_object_to_object_attention_sees_in_training_what_it_sees_in_evaluation(
    drawn_cache: Path,
) -> None:
    cache, recipe = FeatureCache.open(drawn_cache), small_recipe(query_o2o="true", batch_size=3)
    learner = build_learner(
        recipe.train, lambda: build_head(recipe.head, cache.spec), torch.device("cpu")
    )
    source = CacheSource(cache, [learner])
    step = next(source.steps(range(1)))
    step.prepare(1)
    (batch,) = step.batches(learner.regions)
    context = batch.inputs.context
    assert context is not None
    assert len(context.queries) > len(batch.inputs.queries)
    for index, row in enumerate(source.order.rows_of(0)):
        image = cache.read(row, ())
        seen = context.queries[context.image_index == index].numpy()
        for query in detections_of(image, cache.spec).query_index.unique():
            assert (seen == image.queries[query].astype(np.float32)).all(axis=1).any()
        # A matched query is among them even where no detection has it.
        for query in batch.inputs.queries[batch.inputs.image_index == index].numpy():
            assert (seen == query).all(axis=1).any()


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


@pytest.mark.parametrize("step", [-1, 7, 10**9])
def test_a_checkpoint_of_a_step_that_there_is_not_is_refused(
    tmp_path: Path, drawn_cache: Path, step: int
) -> None:
    out = tmp_path / "run"
    with pytest.raises(StoppedError):
        train(drawn_cache, out, small_recipe(steps=6), stop_after(3))
    save_checkpoint(out, {**load_checkpoint(out), "step": step})
    with pytest.raises(HeadError, match=f"does not fit this run .step {step} of 6"):
        train(drawn_cache, out, small_recipe(steps=6), resume=True)


def test_a_stopped_run_is_measured_at_its_step(tmp_path: Path, drawn_cache: Path) -> None:
    out, whole, reporter = tmp_path / "run", tmp_path / "whole", SilentReporter()
    with pytest.raises(StoppedError, match="at step 3"):
        train(drawn_cache, out, small_recipe(steps=6), stop_after(3))
    run_evaluate(EvaluateConfig(drawn_cache, out), reporter)
    assert f"warning: {out} is of step 3 of 6: its training was not ended" in reporter.messages
    train(drawn_cache, out, small_recipe(steps=6), resume=True)
    train(drawn_cache, whole, small_recipe(steps=6))
    assert load_head(out).unfinished == ""
    wanted = load_head(whole).head.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in load_head(out).head.state_dict().items())


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
    assert weights_of(resumed).keys() == weights_of(out).keys()
    assert all(torch.equal(w, weights_of(out)[k]) for k, w in weights_of(resumed).items())
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


def test_compiled_training_gives_the_same_losses(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is captured and run as torch runs it; code generation alone takes minutes."""
    plain = train(drawn_cache, tmp_path / "plain", max_steps=2)
    asked = []

    def capture(head: Any, **options: Any) -> Any:
        asked.append(options)
        return compile_(head, backend="eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", capture)
    recipe = small_recipe(compile="true")
    compiled = train(drawn_cache, tmp_path / "compiled", recipe, max_steps=2)
    assert asked == [{"dynamic": True}]
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-5)
    weights, same = weights_of(tmp_path / "plain"), weights_of(tmp_path / "compiled")
    assert weights.keys() == same.keys()
