"""Work shared among threads: every task once, whoever takes it."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mfdetr_cache.ops.numba_threads import run_kernel


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("tasks", [0, 1, 2, 7, 100])
def test_every_task_is_done_once(threads: int, tasks: int) -> None:
    def kernel(first: int, after: int, counts: np.ndarray) -> None:
        counts[first:after] += 1

    for _ in range(20):
        counts = np.zeros(tasks, dtype=np.int64)
        run_kernel(kernel, tasks, counts)
        assert (counts == 1).all()


def test_the_work_is_over_when_the_call_returns(threads: int) -> None:
    def kernel(first: int, after: int, done: np.ndarray) -> None:
        time.sleep(0.002 * (threading.current_thread() is not threading.main_thread()))
        done[first:after] = 1

    for _ in range(5):
        done = np.zeros(16)
        run_kernel(kernel, 16, done)
        assert done.all()


def test_a_fault_in_any_thread_reaches_the_caller(threads: int) -> None:
    def kernel(first: int, after: int) -> None:
        time.sleep(0.002)
        if first <= 8 < after:
            raise ArithmeticError("piece of task 8")

    for _ in range(5):
        with pytest.raises(ArithmeticError, match="task 8"):
            run_kernel(kernel, 16)


def test_several_callers_do_not_wait_for_one_another(threads: int) -> None:
    """More callers than helpers: each can do all of its work itself."""
    counts = np.zeros((8, 50), dtype=np.int64)

    def kernel(first: int, after: int, mine: np.ndarray) -> None:
        mine[first:after] += 1

    def caller(index: int) -> None:
        for _ in range(20):
            run_kernel(kernel, 50, counts[index])

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(8)]
    for c in callers:
        c.start()
    for c in callers:
        c.join(timeout=60)
    assert (counts == 20).all()
