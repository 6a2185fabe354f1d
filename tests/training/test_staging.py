import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.head.batch import HeadBatch
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.head.sampled_cells import SampledCellsHead
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training import loop as training_loop
from mfdetr_cache.training.input import staging
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cache.training.run_folder import TrainHeadConfig

CPU = torch.device("cpu")


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare in a thread as for a GPU."""
    for module in (staging, training_loop):
        monkeypatch.setattr(module, "overlaps", lambda _device: True)


def numbers(count: int, closed: list[bool]) -> Generator[int, None, None]:
    try:
        yield from range(count)
    finally:
        closed.append(True)


@pytest.mark.usefixtures("overlapping")
def test_one_batch_is_prepared_while_another_is_used() -> None:
    closed: list[bool] = []
    built, second = [], threading.Event()

    def build(number: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        built.append(number)
        if number == 1:
            second.set()
        return 10 * number

    seen = []
    for loaded, batch_of in staging.staged(numbers(4, closed), build, CPU):
        # While the first is in use the second gets ready, and never a third.
        assert second.wait(10)
        time.sleep(0.01)
        assert built[-1] <= loaded + 1
        seen.append((loaded, batch_of()))
    assert seen == [(i, 10 * i) for i in range(4)]
    assert closed == [True]


@pytest.mark.usefixtures("overlapping")
def test_stopping_early_closes_the_stream() -> None:
    closed: list[bool] = []
    stream = staging.staged(numbers(9, closed), lambda n: n, CPU)
    next(stream)
    stream.close()
    assert closed == [True]


@pytest.mark.usefixtures("overlapping")
def test_what_goes_wrong_in_the_thread_is_raised_outside() -> None:
    def build(number: int) -> int:
        if number == 1:
            raise OSError("disk gone")
        return number

    stream = staging.staged(numbers(3, []), build, CPU)
    next(stream)
    with pytest.raises(OSError, match="disk gone"):
        next(stream)


def test_a_cpu_builds_when_asked() -> None:
    built: list[int] = []

    def build(number: int) -> int:
        built.append(number)
        return number

    for loaded, batch_of in staging.staged(numbers(2, []), build, CPU):
        assert loaded not in built
        assert batch_of() == loaded


@pytest.mark.parametrize("accumulate", [1, 2])
def test_staging_changes_no_weight(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    settings = {"hidden_dim": 16, "roi_size": 8, "steps": 5, "batch_size": 3, "min_match_iou": 0}
    recipe = build_recipe(
        "fast", {k: str(v) for k, v in {**settings, "accumulate": accumulate}.items()}
    )

    def train(name: str) -> dict[str, torch.Tensor]:
        run_train_head(TrainHeadConfig(drawn_cache, tmp_path / name, recipe), SilentReporter())
        return load_head(tmp_path / name).head.state_dict()

    cut: list[bool] = []
    prepare = SampledCellsHead.prepare

    def counted(self: SampledCellsHead, batch: HeadBatch) -> HeadBatch:
        found = prepare(self, batch)
        cut.append(found.c1_crops is not None)
        return found

    monkeypatch.setattr(SampledCellsHead, "prepare", counted)
    plain = train("plain")
    assert not cut
    for module in (staging, training_loop):
        monkeypatch.setattr(module, "overlaps", lambda _device: True)
    beside = train("beside")
    assert len(cut) == 5 * accumulate
    assert all(cut)
    assert all(torch.equal(plain[n], beside[n]) for n in plain)
