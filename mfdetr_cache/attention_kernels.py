"""Deformable attention on a CPU, compiled by numba when it is first used.

grid_sample wants a plane per channel and touches memory once per channel and corner. Here the
channels of a head lie next to each other, so a corner is one short vector; nothing is permuted and
no sample is ever stored. Every query's sum, and every head's gradient, is computed by one thread in
a fixed order: results do not depend on the number of threads.

Arrays: value (B, S, H, C), locations (B, N, H, L, P, 2) normalised, weights (B, N, H, L, P), sizes
(L, 2) height and width, starts (L,) first token of each level.
"""

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

# Sums may be reordered and contracted for vector units; infinities and NaN keep their meaning.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "fastmath": {"reassoc", "contract", "nsz"},
}
_BLOCK = 64
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
        """Run a kernel over all of its tasks with as many threads as torch uses.

        Args:
            kernel: Takes the first task, the one after the last, and the arrays.
            tasks: How many there are.
            *arrays: Whatever the kernel reads and writes.
        """
        threads = torch.get_num_threads()
        if threads == 1 or tasks < 2:
            kernel(0, tasks, *arrays)
            return
        pieces = min(tasks, _PIECES * threads)
        bounds = [tasks * i // pieces for i in range(pieces + 1)]

        # No more at a time than torch has threads: each takes every so-many-th piece.
        def some(first: int) -> None:
            for i in range(first, pieces, threads):
                kernel(bounds[i], bounds[i + 1], *arrays)

        list(self._executor().map(some, range(threads)))

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            # A forked process has the object but none of its threads.
            if self._threads is None or self._owner != os.getpid():
                self._threads = ThreadPoolExecutor(os.cpu_count() or 1, "attention")
                self._owner = os.getpid()
            return self._threads


_POOL = _Pool()


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _forward(  # noqa: C901  one loop per axis, the inputs and the output
    first_task: int,
    last_task: int,
    value: Floats,
    sizes: Ints,
    starts: Ints,
    locations: Floats,
    weights: Floats,
    out: Floats,
) -> None:
    heads, channels = value.shape[2], value.shape[3]
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    blocks = (queries + _BLOCK - 1) // _BLOCK
    for task in range(first_task, last_task):
        b = task // blocks
        first = (task % blocks) * _BLOCK
        total = np.empty(channels, value.dtype)
        for n in range(first, min(queries, first + _BLOCK)):
            for h in range(heads):
                total[:] = 0
                for level in range(levels):
                    height, width = sizes[level, 0], sizes[level, 1]
                    for p in range(points):
                        x = locations[b, n, h, level, p, 0] * width - 0.5
                        y = locations[b, n, h, level, p, 1] * height - 0.5
                        if not (x > -1 and y > -1 and x < width and y < height):
                            if math.isnan(x) or math.isnan(y):
                                total[:] = np.nan
                            continue
                        x0, y0 = math.floor(x), math.floor(y)
                        fx, fy = x - x0, y - y0
                        weight = weights[b, n, h, level, p]
                        for dy in range(2):
                            row = y0 + dy
                            if row < 0 or row >= height:
                                continue
                            along_y = weight * (fy if dy == 1 else 1 - fy)
                            for dx in range(2):
                                column = x0 + dx
                                if column < 0 or column >= width:
                                    continue
                                share = along_y * (fx if dx == 1 else 1 - fx)
                                cell = value[b, starts[level] + row * width + column, h]
                                for c in range(channels):
                                    total[c] += share * cell[c]
                for c in range(channels):
                    out[b, n, h, c] = total[c]


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _backward(  # noqa: PLR0913  the inputs and a gradient for each
    first_task: int,
    last_task: int,
    value: Floats,
    sizes: Ints,
    starts: Ints,
    locations: Floats,
    weights: Floats,
    grad: Floats,
    grad_value: Floats,
    grad_locations: Floats,
    grad_weights: Floats,
) -> None:
    heads, channels = value.shape[2], value.shape[3]
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    for task in range(first_task, last_task):
        b, h = task // heads, task % heads
        dots = np.empty(4, value.dtype)
        for n in range(queries):
            above = grad[b, n, h]
            for level in range(levels):
                height, width = sizes[level, 0], sizes[level, 1]
                for p in range(points):
                    x = locations[b, n, h, level, p, 0] * width - 0.5
                    y = locations[b, n, h, level, p, 1] * height - 0.5
                    if not (x > -1 and y > -1 and x < width and y < height):
                        grad_weights[b, n, h, level, p] = 0
                        grad_locations[b, n, h, level, p, 0] = 0
                        grad_locations[b, n, h, level, p, 1] = 0
                        continue
                    x0, y0 = math.floor(x), math.floor(y)
                    fx, fy = x - x0, y - y0
                    weight = weights[b, n, h, level, p]
                    for dy in range(2):
                        row = y0 + dy
                        along_y = weight * (fy if dy == 1 else 1 - fy)
                        for dx in range(2):
                            column = x0 + dx
                            dots[2 * dy + dx] = 0
                            if row < 0 or row >= height or column < 0 or column >= width:
                                continue
                            share = along_y * (fx if dx == 1 else 1 - fx)
                            token = starts[level] + row * width + column
                            cell, below = value[b, token, h], grad_value[b, token, h]
                            dot = value.dtype.type(0)
                            for c in range(channels):
                                dot += above[c] * cell[c]
                                below[c] += share * above[c]
                            dots[2 * dy + dx] = dot
                    top = (1 - fx) * dots[0] + fx * dots[1]
                    bottom = (1 - fx) * dots[2] + fx * dots[3]
                    grad_weights[b, n, h, level, p] = (1 - fy) * top + fy * bottom
                    grad_locations[b, n, h, level, p, 0] = (
                        weight * width * ((1 - fy) * (dots[1] - dots[0]) + fy * (dots[3] - dots[2]))
                    )
                    grad_locations[b, n, h, level, p, 1] = weight * height * (bottom - top)


class KernelAttention(torch.autograd.Function):
    """Deformable attention through the kernels; float32 or float64 on the CPU."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        sizes_hw: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """Weighted sums of samples.

        Args:
            ctx: Keeps the inputs.
            value: Shape (B, S, H, C).
            locations: Shape (B, N, H, L, P, 2).
            weights: Shape (B, N, H, L, P).
            sizes_hw: Height and width of each level.

        Returns:
            Shape (B, N, H, C).
        """
        value, locations, weights = (t.contiguous() for t in (value, locations, weights))
        ctx.save_for_backward(value, locations, weights)
        ctx.sizes_hw = sizes_hw
        out = value.new_empty(*locations.shape[:3], value.shape[3])
        sizes, starts = _layout(sizes_hw)
        tasks = len(value) * -(-locations.shape[1] // _BLOCK)
        _POOL.run(
            _forward, tasks, *_arrays(value), sizes, starts, *_arrays(locations, weights, out)
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN401
        """Gradients with respect to value, locations and weights.

        Args:
            ctx: The inputs.
            grad: Shape (B, N, H, C).

        Returns:
            One gradient per tensor.
        """
        value, locations, weights = ctx.saved_tensors
        grads = (torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights))
        sizes, starts = _layout(ctx.sizes_hw)
        _POOL.run(
            _backward,
            value.shape[0] * value.shape[2],
            *_arrays(value),
            sizes,
            starts,
            *_arrays(locations, weights, grad.contiguous(), *grads),
        )
        return (*grads, None)


def _arrays(*tensors: Tensor) -> list[Any]:
    return [t.detach().numpy() for t in tensors]


def _layout(sizes_hw: tuple[tuple[int, int], ...]) -> tuple[Any, Any]:
    sizes = np.array(sizes_hw, np.int64)
    return sizes, np.concatenate(([0], np.cumsum(sizes.prod(axis=1))[:-1])).astype(np.int64)
