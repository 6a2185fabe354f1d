"""Threads for kernels that numba compiles."""

import os
import threading
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


class _Pool:
    """Threads of this process for the kernels, which run without the GIL.

    numba has threads of its own; idle ones keep a core busy between calls and starve whatever else
    runs on the machine. These sleep.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = -1
        self._threads: ThreadPoolExecutor | None = None

    def run(self, kernel: Callable[..., None], tasks: int, *arrays: Any) -> None:  # noqa: ANN401
        """See :func:`run_kernel`."""
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

        helpers = [self._executor().submit(some) for _ in range(threads - 1)]
        some()
        for helper in helpers:
            # One that has not begun by now would find nothing to do.
            if not helper.cancel():
                helper.result()

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            # A forked process has the object but none of its threads.
            if self._threads is None or self._owner != os.getpid():
                self._threads = ThreadPoolExecutor(os.cpu_count() or 1, "attention")
                self._owner = os.getpid()
            return self._threads


_POOL = _Pool()


def run_kernel(kernel: Callable[..., None], tasks: int, *arrays: Any) -> None:  # noqa: ANN401
    """Call ``kernel(first, end, *arrays)`` over ranges of tasks, on torch's number of threads."""
    _POOL.run(kernel, tasks, *arrays)
