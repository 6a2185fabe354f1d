"""Several processes started by torchrun train the weights that one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mfdetr_cache.head.folder import load_head
from tests.support.command import mfdetr
from tests.support.training import SMALL

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def train(verb: str, options: dict[str, object], steps: int, processes: int = 1) -> None:
    """By the command line: here, or in several processes."""
    settings = {**SMALL, "batch_size": "4", "steps": str(steps), "box_jitter": "0.1"}
    # Two samples a bin, and the points of a coarse grid: smooth enough for the tolerance below.
    settings |= {"roi_sampling_ratio": "2", "num_points": "256"}
    arguments = [verb, "--device", "cpu"]
    arguments += [w for k, v in settings.items() for w in ("--set", f"{k}={v}")]
    arguments += [w for k, v in options.items() for w in (f"--{k}", str(v))]
    if processes == 1:
        done: Any = mfdetr(*arguments)
    else:
        done = subprocess.run(
            [*TORCHRUN, f"--nproc-per-node={processes}", "-m", "mfdetr_cli", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, done.stderr


def assert_close(
    one: dict[str, torch.Tensor], many: dict[str, torch.Tensor], steps: int, lr: float
) -> None:
    for name in one:
        # Float32 sums in another order: an entry whose gradient is near zero may move by the
        # learning rate a step in either direction; nearly all are far closer.
        difference = (one[name].float() - many[name].float()).abs()
        assert float(difference.max()) <= steps * lr
        assert float(difference.mean()) <= 2e-5, name


def last_line(out: Path) -> dict[str, float]:
    line: dict[str, float] = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return line


def test_several_processes_train_what_one_trains(tmp_path: Path, drawn_cache: Path) -> None:
    """Eight images in batches of four: the shares of three processes differ in size."""
    one, many = tmp_path / "one", tmp_path / "many"
    train("train-head", {"cache": drawn_cache, "out": one}, 5)
    train("train-head", {"cache": drawn_cache, "out": many}, 5, processes=3)
    assert_close(
        load_head(one).head.state_dict(), load_head(many).head.state_dict(), steps=5, lr=1e-3
    )
    lines = last_line(one), last_line(many)
    assert lines[0]["regions"] == lines[1]["regions"]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-4)
    assert torch.isfinite(torch.tensor(lines[0]["loss"]))


def test_several_processes_tune_what_one_tunes(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    """Head and detector, whose losses are divided by the objects of all processes."""
    data = {
        "detector": "hf",
        "weights": rtdetr_folder,
        "images": scenes_folder / "images",
        "annotations": scenes_folder / "instances.json",
        "tune": "all",
    }
    one, many = tmp_path / "one", tmp_path / "many"
    # In a third step of this untrained detector, rounding may decide which query has an object.
    train("train-joint", {**data, "out": one}, 2)
    train("train-joint", {**data, "out": many}, 2, processes=2)
    heads = [load_head(out).head.state_dict() for out in (one, many)]
    assert_close(*heads, steps=2, lr=1e-3)
    detectors = [load_file(out / "detector/model.safetensors") for out in (one, many)]
    assert_close(*detectors, steps=2, lr=1e-4)
    lines = last_line(one), last_line(many)
    for name in ("loss", "box_loss"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4)
