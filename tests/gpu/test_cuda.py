"""What must hold on a GPU. Skipped without one; nothing here is needed to develop on a CPU."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.config.train_joint import TrainJointConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head
from mfdetr_pipelines.train_joint import run_train_joint

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.choices import Preset
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import StoppedError
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.model import MaskFrozenDETR
from mfdetr_cache.ops.deformable_attention import deformable_attention, sampled_attention
from mfdetr_cache.ops.dequantisation import decode_maps
from mfdetr_cache.ops.quantisation import ENCODINGS
from mfdetr_cache.ops.quantisation_torch import encode_maps
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.batch import TrainBatch
from mfdetr_cache.training.initial_head import new_head
from mfdetr_cache.training.learner import Learner, loss_of_batch
from mfdetr_cache.training.recipes import Recipe, build_recipe
from tests.support import scenes
from tests.support.batches import batch_of

# Another name only checks that the tests themselves run.
DEVICE = os.environ.get("MFDETR_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA GPU"
)


def recipe(name: str = "fast", **changes: Any) -> Recipe:
    small = {"hidden_dim": 16, "roi_size": 8, "steps": 6, "batch_size": 3, "min_match_iou": 0}
    small["fine_size"] = 16 if name == "fast" else 0
    return build_recipe(name, {k: str(v) for k, v in {**small, **changes}.items()})


def cache_of(folder: Path, detector: Path, path: Path, **changes: Any) -> FeatureCache:
    config = scenes.extract_config(folder, str(detector), path, **changes)
    run_extract(config, SilentReporter())
    return FeatureCache.open(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_deformable_attention_is_that_of_a_cpu(dtype: torch.dtype) -> None:
    """At the network's own sizes, forwards and backwards."""
    sizes = ((38, 50), (19, 25), (10, 13), (5, 7))
    tokens = sum(h * w for h, w in sizes)
    inputs = (
        torch.randn(2, tokens, 8, 32).to(dtype),
        torch.rand(2, 300, 8, 4, 4, 2).to(torch.promote_types(dtype, torch.float32)) * 1.6 - 0.3,
        torch.rand(2, 300, 8, 4, 4).to(torch.promote_types(dtype, torch.float32)) / 16,
    )
    above = torch.randn(2, 300, 256).to(dtype)
    results = []
    for device, attention, precise in (
        (DEVICE, deformable_attention, None),
        ("cpu", sampled_attention, torch.float64),
    ):
        there = [t.to(device, precise).requires_grad_() for t in inputs]
        found = attention(there[0], sizes, there[1], there[2])
        grads = torch.autograd.grad(found, there, above.to(device, precise))
        results.append([t.double().cpu() for t in (found, *grads)])
    # Relative to each tensor's size: coordinates up to 80 cells in 24 bits, sums of up to some
    # hundred terms; half precision rounds the result to 8 bits.
    bound = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-7}[dtype]
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("preset", ["fp16", "int8", "int4"])
def test_codes_are_decoded_alike(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, preset: str
) -> None:
    cache = cache_of(scenes_folder, rtdetr_folder, tmp_path / "c.zarr", preset=preset)
    for row in (0, 1):
        for stored in cache.read(row).maps.values():
            there, here = decode_maps([stored], DEVICE), decode_maps([stored])
            # A product and a sum, which a GPU may contract to one rounding.
            torch.testing.assert_close(there.cpu(), here, rtol=2**-22, atol=1e-6)


@pytest.mark.parametrize("preset", ENCODINGS)
def test_maps_are_quantised_as_on_a_cpu(preset: Preset) -> None:
    """Down to float16's smallest numbers, where a fast kernel would flush or multiply instead."""
    sizes = torch.logspace(-9, 4, 7)[None, :, None, None]
    maps = torch.randn(3, 7, 21, 13) * sizes
    there, here = (encode_maps(m, ENCODINGS[preset]).tensors for m in (maps.to(DEVICE), maps))
    for ours, theirs in zip(there, here, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("name", ["h-detr-r50", "h-detr-swin-t", "dino-r50"])
def test_a_detector_never_waits_for_the_gpu(name: str, amp: Literal["off", "bf16"]) -> None:
    """The next batch is started while one is computed."""
    if DEVICE == "cpu":
        pytest.skip("a CPU waits for itself")
    detector = load_detector(name, None, DetectorOptions(amp=amp)).to(DEVICE)
    pixels = torch.randn(2, 3, 256, 320, device=DEVICE)
    try:
        # The first time kernels are built and constants copied, which may wait.
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            detector.forward(pixels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def double(batch: TrainBatch) -> TrainBatch:
    """The same batch in float64."""

    def up(found: Any) -> Any:
        changes = {
            f.name: v.double()
            for f in dataclasses.fields(found)
            if isinstance(v := getattr(found, f.name), torch.Tensor) and v.is_floating_point()
        }
        return dataclasses.replace(found, **changes)

    groups = tuple(
        dataclasses.replace(g, maps={k: v.double() for k, v in g.maps.items()})
        for g in batch.inputs.groups
    )
    return dataclasses.replace(
        up(batch), inputs=dataclasses.replace(up(batch.inputs), groups=groups)
    )


@pytest.mark.parametrize("name", ["fast", "paper", "fcn", "ffn", "istr"])
def test_losses_and_gradients_are_those_of_a_cpu(drawn_cache: Path, name: str) -> None:
    cache, settings = FeatureCache.open(drawn_cache), recipe(name, points="grid")
    results = []
    for device in (DEVICE, "cpu"):
        torch.manual_seed(0)
        head = new_head(settings.head, cache, settings.train).double()
        with torch.no_grad():
            for name_of, parameter in head.named_parameters():
                if name_of.endswith("sampling_offsets.bias"):
                    # They begin as whole cells, where rounding decides which slope is taken.
                    parameter.add_(torch.rand(parameter.shape) * 0.8 + 0.1)
        head.to(device)
        images = [cache.read(row, head.map_names) for row in cache.rows[:3]]
        batch = double(batch_of(images, head, settings.train, device))
        loss = loss_of_batch(head, batch, settings.train, 0).total
        loss.backward()
        grads = [p.grad.cpu() for p in head.parameters() if p.grad is not None]
        results.append([loss.detach().cpu().reshape(1), *grads])
    assert len(results[0]) > 3
    for ours, theirs in zip(*results, strict=True):
        # The losses themselves are float32; a sum over some thousand points.
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_head_learns_and_is_measured(tmp_path: Path, drawn_cache: Path, amp: str) -> None:
    if amp == "fp16" and DEVICE == "cpu":
        pytest.skip("fp16 needs a GPU")
    config = TrainHeadConfig(
        drawn_cache, tmp_path / "run", recipe(steps=40, lr=3e-3, amp=amp), device=DEVICE
    )
    first = dataclasses.replace(config, out=tmp_path / "first", recipe=recipe(steps=2, amp=amp))
    begun = run_train_head(first, SilentReporter())
    done = run_train_head(config, SilentReporter())
    assert done.loss < 0.9 * begun.loss
    found = run_evaluate(
        EvaluateConfig(drawn_cache, tmp_path / "run", device=DEVICE), SilentReporter()
    )
    on_cpu = run_evaluate(
        EvaluateConfig(drawn_cache, tmp_path / "run", device="cpu"), SilentReporter()
    )
    # Pixels at a probability of one half may fall to either side.
    assert abs(found.mask.AP - on_cpu.mask.AP) < 0.02


def test_the_first_steps_are_those_of_a_cpu(tmp_path: Path, drawn_cache: Path) -> None:
    losses = []
    for name, device in (("there", DEVICE), ("here", "cpu")):
        config = TrainHeadConfig(
            drawn_cache, tmp_path / name, recipe(steps=1, points="grid"), device=device
        )
        losses.append(run_train_head(config, SilentReporter()).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_stopped_run_goes_on(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the order in which a GPU adds: within the size of a step of the uninterrupted run."""
    whole = TrainHeadConfig(drawn_cache, tmp_path / "whole", recipe(lr=1e-3), device=DEVICE)
    run_train_head(whole, SilentReporter())
    parted = dataclasses.replace(whole, out=tmp_path / "parted")
    learn = Learner.learn

    def stop_after_three(self: Learner, *arguments: Any) -> Any:
        report = learn(self, *arguments)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", stop_after_three)
        with pytest.raises(StoppedError):
            run_train_head(parted, SilentReporter())
    run_train_head(dataclasses.replace(parted, resume=True), SilentReporter())
    first, second = (load_head(r.out).head.state_dict() for r in (whole, parted))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=2e-3)


def test_an_extraction_agrees_with_a_cpu(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    ours = cache_of(scenes_folder, rtdetr_folder, tmp_path / "gpu.zarr", device=DEVICE)
    theirs = cache_of(scenes_folder, rtdetr_folder, tmp_path / "cpu.zarr")
    for row in ours.rows:
        mine, wanted = ours.read(row), theirs.read(row)
        for name, stored in wanted.maps.items():
            there, here = decode_maps([mine.maps[name]]), decode_maps([stored])
            # TF32 convolutions round to 11 bits, a few layers deep.
            assert (there - here).norm() <= 2e-2 * here.norm()


def test_detector_and_head_train_together(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    config = TrainJointConfig(
        str(rtdetr_folder),
        scenes_folder / "images",
        scenes_folder / "instances.json",
        tmp_path / "run",
        recipe(steps=2),
        tune="all",
        device=DEVICE,
    )
    assert run_train_joint(config, SilentReporter()).box_loss > 0


def test_predicted_masks_are_those_of_a_cpu(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, drawn_cache: Path
) -> None:
    run_train_head(
        TrainHeadConfig(drawn_cache, tmp_path / "run", recipe(steps=2)), SilentReporter()
    )
    image = next((scenes_folder / "images").iterdir())
    there, here = (
        MaskFrozenDETR.from_pretrained(rtdetr_folder, tmp_path / "run", device=device)(
            image, threshold=0.0, top_k=5
        )
        for device in (DEVICE, "cpu")
    )
    # TF32 convolutions in the detector may swap queries of nearly equal score.
    np.testing.assert_allclose(there.scores, here.scores, rtol=0.05)
    assert there.masks.shape == here.masks.shape


@pytest.mark.parametrize("name", ["fast", "paper"])
def test_forward_and_backward_never_wait_for_the_gpu(drawn_cache: Path, name: str) -> None:
    """Whatever waited would leave it idle until the next operation is started."""
    if DEVICE == "cpu":
        pytest.skip("a CPU waits for itself")
    cache, settings = FeatureCache.open(drawn_cache), recipe(name, amp="bf16")
    head = new_head(settings.head, cache, settings.train).to(DEVICE).train()
    images = [cache.read(row, head.map_names) for row in cache.rows[:3]]
    batch = batch_of(images, head, settings.train, DEVICE)
    try:
        # The first time kernels are built, which may wait.
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            loss_of_batch(head, batch, settings.train, 0).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
