"""Runs that are gone on with: with another cache, and after a loss that grew."""

import shutil
from pathlib import Path

import pytest
import torch

from mfdetr_cache.config import to_dict
from mfdetr_cache.errors import HeadError
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import RunRecord
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.learner import Learner, build_learner
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cache.training.run import Run
from mfdetr_cache.training.run_folder import BEFORE_FILE, load_checkpoint, prepare_folder
from tests.support.images import make_spec

HEAD = HeadConfig(hidden_dim=8, roi_size=8, image_layers=1, box_layers=1, use_c1=False)


def make_learner() -> Learner:
    spec = make_spec(width=8, c1_channels=8, strides=(8, 16), num_queries=6)
    train = build_recipe("demo", {"steps": "1000"}).train
    return build_learner(train, lambda: build_head(HEAD, spec), torch.device("cpu"))


def learn(learner: Learner, *losses: float) -> None:
    """What steps of these losses leave behind, but for the weights."""
    learner.step += len(losses)
    learner._losses = [*learner._losses, *losses][-50:]


def test_the_checkpoint_from_before_the_loss_grew_is_kept_until_it_has_fallen(
    tmp_path: Path,
) -> None:
    learner = make_learner()
    run = Run(learner, tmp_path)
    learn(learner, *[2.0] * 60)
    assert not run.save()
    # Ten steps are enough to see it, and a loss within a half is no growth.
    learn(learner, *[2.9] * 10)
    assert not run.save()
    assert not (tmp_path / BEFORE_FILE).exists()
    good = learner.step
    learn(learner, *[9.0] * 10)
    assert f"is the checkpoint of step {good}." in run.save()
    learn(learner, *[90.0] * 60)
    assert not run.save()
    assert load_checkpoint(tmp_path)["step"] == learner.step
    assert load_checkpoint(tmp_path, BEFORE_FILE)["step"] == good
    # Neither a resume nor a rise that goes on takes a bad one for the measure of a good one.
    resumed = Run(make_learner(), tmp_path, resume=True)
    learn(resumed.learner, *[80.0] * 10)
    assert not resumed.save()
    assert load_checkpoint(tmp_path, BEFORE_FILE)["step"] == good
    learn(resumed.learner, *[2.0] * 10)
    assert not resumed.save()
    assert not (tmp_path / BEFORE_FILE).exists()


def test_a_run_goes_on_with_its_own_cache_alone(tmp_path: Path) -> None:
    """Labels and detector of two caches can be the same, and their precision another."""
    detector = detector_identity(make_spec())

    def record(cache_id: str) -> RunRecord:
        return RunRecord(
            detector=detector,
            train=to_dict(TrainConfig()),
            cache={"path": f"{cache_id}.zarr", "cache_id": cache_id},
            annotations={"id": "same"},
        )

    prepare_folder(tmp_path, HEAD, record("one"), resume=False)
    prepare_folder(tmp_path, HEAD, record("one"), resume=True)
    with pytest.raises(HeadError, match=r"learned from another cache than two\.zarr"):
        prepare_folder(tmp_path, HEAD, record("two"), resume=True)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """Of the same head and settings but for the seed, so that every tensor would fit."""
    detector = detector_identity(make_spec())
    for seed in (0, 1):
        record = RunRecord(detector=detector, train=to_dict(TrainConfig(seed=seed)))
        prepare_folder(tmp_path / str(seed), HEAD, record, resume=False)
        learner = make_learner()
        learn(learner, 2.0)
        Run(learner, tmp_path / str(seed)).save()
    Run(make_learner(), tmp_path / "1", resume=True)
    shutil.copy(tmp_path / "0/checkpoint.pt", tmp_path / "1/checkpoint.pt")
    with pytest.raises(HeadError, match=r"checkpoint\.pt is of another run than its config\.json"):
        Run(make_learner(), tmp_path / "1", resume=True)
