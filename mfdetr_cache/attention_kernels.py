"""Deformable attention on a CPU, compiled by numba when it is first used.

grid_sample wants a plane per channel and touches memory once per channel and corner. Here the
channels of a head lie next to each other, so a corner is one short vector; nothing is permuted and
no sample is ever stored. Every query's sum, and every head's gradient, is computed by one thread in
a fixed order: results do not depend on the number of threads.

Arrays: value (B, S, H, C), locations (B, N, H, L, P, 2) normalised, weights (B, N, H, L, P), sizes
(L, 2) height and width, starts (L,) first token of each level.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mfdetr_cache.kernel_threads import OPTIONS, Floats, Ints, run_kernel

_BLOCK = 64


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
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


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
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
        run_kernel(
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
        run_kernel(
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
