import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.errors import (
    CacheError,
    HeadError,
    OutputError,
    StoppedError,
    TrainingError,
)
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training import learner as learner_module
from mfdetr_cache.training.input.loader import CacheSource
from mfdetr_cache.training.learner import Learner
from mfdetr_cache.training.run_folder import load_checkpoint, save_checkpoint
from mfdetr_cache.training.run_log import read_log
from tests.support.signals import stop_after
from tests.support.training import same_weights, small_recipe, train


@pytest.mark.parametrize(
    ("stop_at", "optimiser"), [(1, "adamw"), (5, "adamw"), (7, "adamw"), (5, "muon")]
)
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
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


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
    assert same_weights(out, tmp_path / "reference")


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


def test_a_run_becomes_longer(tmp_path: Path, drawn_cache: Path) -> None:
    out, recipe = tmp_path / "run", small_recipe(schedule="step", drops="0.99")
    train(drawn_cache, out, recipe, max_steps=3)
    # Only if that was asked for: a recipe's own length must not lengthen a run.
    for steps in ({}, {"max_steps": 2}):
        with pytest.raises(HeadError, match=r"cannot resume .*: train\.steps was 3 and is"):
            train(drawn_cache, out, recipe, resume=True, **steps)
    assert train(drawn_cache, out, recipe, resume=True, max_steps=5).steps == 5
    assert json.loads((out / "config.json").read_text())["before"][0]["steps"] == 3
    # Where the rate does not hang on the length, it is the run that was longer from its beginning.
    train(drawn_cache, tmp_path / "whole", recipe, max_steps=5)
    assert same_weights(out, tmp_path / "whole")
    assert load_head(out).unfinished == ""


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
            # No regular file, which is another reason not to be written.
            (folder / "metrics.jsonl").symlink_to("/dev/full")
        if done == 15:
            (folder / "metrics.jsonl").unlink()

    config = TrainHeadConfig(drawn_cache, folder, small_recipe(**settings), device="cpu")
    with pytest.warns(UserWarning, match="metrics.jsonl cannot be written"):
        run_train_head(config, reporter, fill_the_disk)
    (warning,) = [m for m in reporter.messages if m.startswith("warning")]
    assert "checkpoint.pt cannot be written, the disk is full" in warning
    assert [line["step"] for line in read_log(folder)] == [10, 20]
    assert load_checkpoint(folder)["step"] == 20
    for name in ("head.safetensors", "config.json"):
        assert (folder / name).is_file()
    assert same_weights(folder, reference)

    # At the very end it is an error; where there is room again, --resume only has to write.
    (folder / "head.safetensors").unlink()
    (folder / "head.safetensors.partial").symlink_to("/dev/full")
    again = dataclasses.replace(config, resume=True)
    with pytest.raises(OutputError, match="head.safetensors cannot be written, the disk is full"):
        run_train_head(again, reporter)
    run_train_head(again, reporter)
    assert (folder / "head.safetensors").is_file()


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
