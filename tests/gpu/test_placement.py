"""What belongs on the GPU is moved there, and back: the commands on a pretended one."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mfdetr_pipelines import filling
from mfdetr_pipelines.ablation.comparison import Comparison
from mfdetr_pipelines.ablation.rows import AblationRow
from mfdetr_pipelines.ablation.run import run_ablate
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.ablate import AblateConfig
from mfdetr_pipelines.config.cache import VerifyConfig
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.plan import PlanConfig
from mfdetr_pipelines.config.predict import PredictConfig
from mfdetr_pipelines.config.shared import LiveDetector, WorkOptions
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.config.train_joint import TrainJointConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.plan import run_plan
from mfdetr_pipelines.predict import run_predict
from mfdetr_pipelines.train_head import run_train_head
from mfdetr_pipelines.train_joint import run_train_joint

from mfdetr_cache.demo import demo_detector
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import StoppedError
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.learner import Learner
from mfdetr_cache.training.recipes import Recipe, build_recipe
from tests.support import detectors, scenes, small_torchvision
from tests.support.pretend_gpu import GpuTensor, pretend_gpu

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a CUDA GPU is there, and needs no pretending"
)


def recipe(**changes: Any) -> Recipe:
    small = {"hidden_dim": 8, "roi_size": 8, "steps": 4, "batch_size": 2, "min_match_iou": 0}
    small["fine_size"] = 16
    # Memory of several processes cannot be pretended to be a GPU's.
    small["num_processes"] = 0
    return build_recipe("fast", {k: str(v) for k, v in {**small, **changes}.items()})


@contextlib.contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """SIGTERM arrives after a step."""
    learn = Learner.learn

    def learn_and_stop(self: Learner, *arguments: Any) -> Any:
        report = learn(self, *arguments)
        if self.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "learn", learn_and_stop)
        yield


def test_what_is_pretended() -> None:
    here = torch.arange(6.0).reshape(2, 3)
    layer = torch.nn.Linear(3, 4)
    with pretend_gpu():
        there = here.to("cuda")
        assert there.device == torch.device("cuda:0")
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            layer(there)
        with pytest.raises(TypeError, match="can't convert cuda"):
            there.numpy()
        made = torch.zeros(2, 3, device=there.device)
        assert isinstance(made + there, GpuTensor)
        assert torch.equal((made + there * 2)[:, 1:].cpu(), here[:, 1:] * 2)
        made[0] = there[1]
        made[1] = here[0].to(there)
        assert torch.equal(made.cpu(), here.flip(0))
        assert there[torch.tensor([1])].sum().item() == 12
        moved = layer.to("cuda")
        moved(there).sum().backward()
        assert isinstance(moved.weight.grad, GpuTensor)
        optimiser = torch.optim.AdamW(moved.parameters())
        optimiser.step()
        torch.testing.assert_close(moved.weight.grad.cpu(), here.sum(0).expand(4, 3))


def test_a_cache_is_made_and_learned_from(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, drawn_cache: Path
) -> None:
    """Extract, verify, predict; train, stop, go on, evaluate: what a CPU gives without a stop."""
    images, weights = scenes_folder / "images", str(rtdetr_folder)
    training = TrainHeadConfig(drawn_cache, tmp_path / "cpu", recipe(steps=2), device="cpu")
    run_train_head(training, SilentReporter())
    evaluation = EvaluateConfig(drawn_cache, tmp_path / "cpu", device="cpu")
    wanted = run_evaluate(evaluation, SilentReporter())
    with pretend_gpu():
        extraction = scenes.extract_config(scenes_folder, weights, tmp_path / "c.zarr", limit=3)
        run_extract(dataclasses.replace(extraction, device="cuda"), SilentReporter())
        live = LiveDetector(weights, images)
        verified = run_verify(
            VerifyConfig(tmp_path / "c.zarr", live=2, detector=live, device="cuda"),
            SilentReporter(),
        )
        training = dataclasses.replace(training, out=tmp_path / "cuda", device="cuda")
        with stopped_after(1), pytest.raises(StoppedError):
            run_train_head(training, SilentReporter())
        run_train_head(dataclasses.replace(training, resume=True), SilentReporter())
        evaluation = EvaluateConfig(drawn_cache, tmp_path / "cuda", device="cuda")
        found = run_evaluate(evaluation, SilentReporter())
        prediction = PredictConfig(
            (str(next(images.iterdir())),),
            weights,
            tmp_path / "cuda",
            tmp_path / "masks",
            threshold=0.0,
            top_k=3,
            device="cuda",
        )
        predicted = run_predict(prediction, SilentReporter())
    assert not verified.faults
    assert sum(i.num_objects for i in predicted.images) == 3
    ours, theirs = (load_head(tmp_path / d).head.state_dict() for d in ("cuda", "cpu"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-3)
    # Pixels at a probability of one half may fall to either side.
    assert pytest.approx(wanted.mask.AP, abs=0.02) == found.mask.AP


def test_rows_learn_side_by_side(tmp_path: Path, drawn_cache: Path) -> None:
    rows = (
        AblationRow("plain", recipe(steps=2)),
        AblationRow("every loss", recipe(steps=2, mask_scoring="true", points="grid")),
    )
    with pretend_gpu():
        config = AblateConfig(
            Comparison("rows", rows),
            cache=(str(drawn_cache),),
            val_cache=(str(drawn_cache),),
            out=tmp_path,
            device="cuda",
        )
        results = run_ablate(config, SilentReporter())
    assert [r.problem for r in results] == ["", ""]


def test_detector_and_head_learn_together(tmp_path: Path, scenes_folder: Path) -> None:
    config = TrainJointConfig(
        str(demo_detector()),
        scenes_folder / "images",
        scenes_folder / "instances.json",
        tmp_path / "run",
        recipe(steps=2),
        tune="all",
        device="cuda",
    )
    with pretend_gpu():
        assert run_train_joint(config, SilentReporter()).box_loss > 0


def test_a_plan_measures(tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path) -> None:
    config = PlanConfig(
        str(rtdetr_folder),
        scenes_folder / "instances.json",
        recipe=recipe(),
        images=scenes_folder / "images",
        disk=tmp_path,
        sample=2,
        disk_seconds=0.1,
        device="cuda",
    )
    with pretend_gpu():
        plan = run_plan(config, SilentReporter())
    assert plan.head_seconds > 0


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "hf"])
def test_detectors_with_tensors_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Absent queries and the tokens of a prompt are made where the image is."""
    if name == "hf":
        detectors.save_grounding_dino(tmp_path)
        detector = load_detector("hf", str(tmp_path), DetectorOptions(prompt=("box", "tiger")))
    else:
        small_torchvision.write_small(tmp_path / "m.pth", name, monkeypatch)
        detector = load_detector(f"torchvision:{name}", str(tmp_path / "m.pth"))
    pixels = torch.rand(1, 3, 96, 128)
    on_cpu = detector.forward(pixels)
    with pretend_gpu():
        output = detector.to("cuda").forward(pixels.to("cuda"))
        assert isinstance(output.queries, GpuTensor)
        assert all(isinstance(m, GpuTensor) for m in output.maps.values())
        output = output.cpu()
    assert torch.equal(output.class_logits, on_cpu.class_logits)


@pytest.mark.parametrize(
    ("asked", "pending", "free", "found"),
    [(3, 1, 0, 3), (0, 4_999, 99, 1), (0, 5_000, 99, 2), (0, 10**6, 99, 6), (0, 10**6, 13, 2)],
)
def test_a_long_extraction_takes_several_processes(
    tmp_path: Path,
    scenes_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: int,
    pending: int,
    free: int,
    found: int,
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sysconf", lambda name: 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * 2**30, 0))
    config = scenes.extract_config(
        scenes_folder, "x", tmp_path / "c.zarr", device="cuda", work=WorkOptions(workers=asked)
    )
    with pretend_gpu():
        assert filling._num_processes(config, pending) == found
    on_cpu = dataclasses.replace(config, device="cpu")
    assert filling._num_processes(on_cpu, pending) == max(1, asked)
