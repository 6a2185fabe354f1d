"""Threads for kernels that numba compiles."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

# Sums may be reordered and contracted for vector units; infinities and NaN keep their meaning.
FAST: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}}
# Pieces of work per thread, so that none waits long for the last one.
_PIECES = 4


def run_kernel(kernel: Callable[..., None], tasks: int, *inputs: Any) -> None:  # noqa: ANN401
    """Call ``kernel(first, end, *inputs)`` over ranges of tasks, on torch's number of threads.

    Tensors are handed on as arrays. numba has threads of its own; idle ones keep a core busy
    between calls and starve whatever else runs on the machine. Ours sleep.
    """
    arrays = [a.detach().numpy() if isinstance(a, torch.Tensor) else a for a in inputs]
    threads = torch.get_num_threads()
    if threads == 1 or tasks < 2:
        kernel(0, tasks, *arrays)
        return
    pieces = min(tasks, _PIECES * threads)
    bounds = [tasks * i // pieces for i in range(pieces + 1)]
    left = iter(range(pieces))

    # Whoever is free takes the next piece: torch's own threads may keep a core busy for a while
    # after their work is done. The calling thread works too, it has a core already.
    def some() -> None:
        for i in left:
            kernel(bounds[i], bounds[i + 1], *arrays)

    pool = _pool_of(os.getpid())
    helpers = [pool.submit(some) for _ in range(threads - 1)]
    some()
    for helper in helpers:
        # One that has not begun by now would find nothing to do.
        if not helper.cancel():
            helper.result()


# By process: one that was forked has the object but none of its threads.
@functools.lru_cache(maxsize=1)
def _pool_of(_process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "attention")
