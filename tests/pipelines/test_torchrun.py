"""Two processes started by torchrun train the weights that one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfdetr_cache.head.folder import load_head
from tests.pipelines.test_train_head import SMALL


def run_cli(command: list[str], cache: Path, out: Path) -> None:
    settings = {**SMALL, "batch_size": "4", "steps": "5", "box_jitter": "0.1"}
    arguments = [w for k, v in settings.items() for w in ("--set", f"{k}={v}")]
    done = subprocess.run(
        [
            *command,
            "-m",
            "mfdetr_cli",
            "train-head",
            "--cache",
            str(cache),
            "--out",
            str(out),
            "--device",
            "cpu",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_train_what_one_trains(
    tmp_path: Path, drawn_cache: Path, count: int
) -> None:
    """Eight images in batches of four; with three processes the shares differ in size."""
    run_cli([sys.executable], drawn_cache, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run_cli([*torchrun, f"--nproc-per-node={count}"], drawn_cache, tmp_path / "many")
    one, many = (load_head(tmp_path / n).head.state_dict() for n in ("one", "many"))
    for name in one:
        # Float32 sums in another order, five steps of `fast`: an entry whose gradient is near zero
        # may move by up to lr = 1e-3 a step in either direction; nearly all are far closer.
        difference = (one[name] - many[name]).abs()
        assert float(difference.max()) <= 5e-3
        assert float(difference.mean()) <= 2e-5, name
    losses = [
        json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1])
        for n in ("one", "many")
    ]
    assert losses[0]["regions"] == losses[1]["regions"]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-4)
    assert torch.isfinite(torch.tensor(losses[0]["loss"]))
