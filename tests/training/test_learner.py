import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import ConfigError, TrainingError
from mfdetr_cache.evaluation.detections import detections_of
from mfdetr_cache.head.build import build_head
from mfdetr_cache.ops.quantisation import StoredMap
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training import learner as learner_module
from mfdetr_cache.training.distributed import split
from mfdetr_cache.training.input.loader import CacheSource
from mfdetr_cache.training.learner import build_learner, loss_of_batch
from mfdetr_cache.training.loop import TrainingLoop
from mfdetr_cache.training.run import Run
from mfdetr_cache.training.run_log import RunLog
from mfdetr_cache.types import CachedImage
from tests.support.batches import batch_of
from tests.support.training import small_recipe, train, weights_of


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


def test_half_precision_trains_and_says_where_it_cannot(drawn_cache: Path, tmp_path: Path) -> None:
    whole = train(drawn_cache, tmp_path / "whole", max_steps=2)
    half = train(drawn_cache, tmp_path / "half", small_recipe(amp="bf16"), max_steps=2)
    # bfloat16 has 8 bits: the loss of two steps moves by a few per cent at most, but it moves.
    assert half.loss != whole.loss
    assert half.loss == pytest.approx(whole.loss, rel=0.05)
    with pytest.raises(ConfigError, match="amp=fp16 needs a GPU"):
        train(drawn_cache, tmp_path / "fp16", small_recipe(amp="fp16"))


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
