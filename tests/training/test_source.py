"""Steps prepared ahead in a thread: in order, one at a time, and to the same weights."""

import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.head.batch import HeadBatch
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.sampled_cells import SampledCellsHead
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.input.loader import CacheSource
from mfdetr_cache.training.input.source import staged
from mfdetr_cache.training.learner import build_learner
from mfdetr_cache.training.loop import TrainingLoop
from mfdetr_cache.training.run import Run
from tests.support.training import small_recipe

CPU = torch.device("cpu")


class FakeStep:
    """Keeps who prepared it, and in how many micro-batches."""

    def __init__(self, number: int, fails: Exception | None = None) -> None:
        self.number = number
        self.num_images = self.num_own_images = 4
        self.counts: dict[Any, int] = {}
        self.micro_batches = 0
        self.prepared = threading.Event()
        self.threads: list[threading.Thread] = []
        self._fails = fails

    def prepare(self, micro_batches: int) -> None:
        if self._fails is not None:
            raise self._fails
        self.threads.append(threading.current_thread())
        self.micro_batches = micro_batches
        self.prepared.set()

    def batches(self, regions: Any) -> list[Any]:
        return []

    def release(self) -> None:
        pass


def in_order(
    steps: Sequence[FakeStep], closed: list[bool] | None = None
) -> Generator[FakeStep, None, None]:
    try:
        yield from steps
    finally:
        if closed is not None:
            closed.append(True)


def test_one_step_is_prepared_while_another_is_used() -> None:
    closed: list[bool] = []
    steps = [FakeStep(i) for i in range(4)]
    seen = []
    for step in staged(in_order(steps, closed), 2, CPU):
        seen.append(step.number)
        assert threading.current_thread() not in step.threads
        # While it is in use the next one gets ready, and never a third.
        if step.number < 3:
            assert steps[step.number + 1].prepared.wait(10)
        time.sleep(0.01)
        assert not any(later.prepared.is_set() for later in steps[step.number + 2 :])
    assert seen == [0, 1, 2, 3]
    assert all(step.micro_batches == 2 for step in steps)
    assert closed == [True]


def test_later_steps_follow_what_the_loop_made_of_one() -> None:
    """The one that was being prepared meanwhile is the last of the old kind."""
    steps = [FakeStep(i) for i in range(5)]
    found = []
    for step in staged(in_order(steps), 1, CPU):
        found.append(step.micro_batches)
        if step.number >= 1:
            step.prepare(4)
    assert found == [1, 1, 1, 4, 4]


def test_a_step_that_finds_no_room_comes_unprepared() -> None:
    full = FakeStep(1, torch.OutOfMemoryError("CUDA out of memory"))
    steps = [FakeStep(0), full, FakeStep(2)]
    assert [s.micro_batches for s in staged(in_order(steps), 1, CPU)] == [1, 0, 1]


def test_stopping_early_closes_the_stream() -> None:
    closed: list[bool] = []
    stream = staged(in_order([FakeStep(i) for i in range(9)], closed), 1, CPU)
    next(stream)
    stream.close()
    assert closed == [True]


def test_what_goes_wrong_in_the_thread_is_raised_outside() -> None:
    steps = [FakeStep(0), FakeStep(1, OSError("disk gone")), FakeStep(2)]
    stream = staged(in_order(steps), 1, CPU)
    next(stream)
    with pytest.raises(OSError, match="disk gone"):
        next(stream)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_staging_changes_no_weight(
    drawn_cache: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    recipe = small_recipe(steps=5, accumulate=accumulate)
    cache = FeatureCache.open(drawn_cache)

    def train(*, stage: bool) -> dict[str, torch.Tensor]:
        learner = build_learner(recipe.train, lambda: build_head(recipe.head, cache.spec), CPU)
        source = CacheSource(cache, [learner], stage=stage)
        TrainingLoop(source, [Run(learner)], SilentReporter()).run()
        return learner.head.state_dict()

    cut: list[bool] = []
    prepare = SampledCellsHead.prepare

    def counted(self: SampledCellsHead, batch: HeadBatch) -> HeadBatch:
        found = prepare(self, batch)
        cut.append(found.c1_crops is not None)
        return found

    monkeypatch.setattr(SampledCellsHead, "prepare", counted)
    plain = train(stage=False)
    assert not cut
    beside = train(stage=True)
    assert len(cut) == 5 * accumulate
    assert all(cut)
    assert all(torch.equal(plain[n], beside[n]) for n in plain)
