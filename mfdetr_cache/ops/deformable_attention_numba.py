"""Deformable attention on a CPU, compiled by numba when it is first used.

grid_sample wants a plane per channel and touches memory once per channel and corner. Here the
channels of a head lie next to each other, so a corner is one short vector; nothing is permuted and
no sample is ever stored. Every query's sum, and every head's gradient, is computed by one thread in
a fixed order: results do not depend on the number of threads.

Arrays: value (S, H, C), locations (N, H, L, P, 2) normalised, weights (N, H, L, P), images (N,) the
image of each query, rising, sizes (I, L, 2) height and width of each level of each image, starts
(I, L) first token of each.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfdetr_cache.ops.numba_compile import compiled
from mfdetr_cache.ops.numba_threads import FAST, Floats, Ints, run_kernel
from mfdetr_cache.ops.packed_levels import PackedLevels

_BLOCK = 64


@compiled(**FAST)
def _forward(  # noqa: C901, PLR0913  one loop per axis, the inputs and the output
    first_task: int,
    last_task: int,
    value: Floats,
    images: Ints,
    sizes: Ints,
    starts: Ints,
    locations: Floats,
    weights: Floats,
    out: Floats,
) -> None:
    heads, channels = value.shape[1], value.shape[2]
    queries, levels, points = locations.shape[0], locations.shape[2], locations.shape[3]
    for task in range(first_task, last_task):
        first = task * _BLOCK
        total = np.empty(channels, value.dtype)
        for n in range(first, min(queries, first + _BLOCK)):
            i = images[n]
            for h in range(heads):
                total[:] = 0
                for level in range(levels):
                    height, width = sizes[i, level, 0], sizes[i, level, 1]
                    for p in range(points):
                        x = locations[n, h, level, p, 0] * width - 0.5
                        y = locations[n, h, level, p, 1] * height - 0.5
                        if not (x > -1 and y > -1 and x < width and y < height):
                            if math.isnan(x) or math.isnan(y):
                                total[:] = np.nan
                            continue
                        x0, y0 = math.floor(x), math.floor(y)
                        fx, fy = x - x0, y - y0
                        weight = weights[n, h, level, p]
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
                                cell = value[starts[i, level] + row * width + column, h]
                                for c in range(channels):
                                    total[c] += share * cell[c]
                for c in range(channels):
                    out[n, h, c] = total[c]


@compiled(**FAST)
def _backward(  # noqa: PLR0913  the inputs and a gradient for each
    first_task: int,
    last_task: int,
    value: Floats,
    bounds: Ints,
    sizes: Ints,
    starts: Ints,
    locations: Floats,
    weights: Floats,
    grad: Floats,
    grad_value: Floats,
    grad_locations: Floats,
    grad_weights: Floats,
) -> None:
    heads, channels = value.shape[1], value.shape[2]
    levels, points = locations.shape[2], locations.shape[3]
    for task in range(first_task, last_task):
        i, h = task // heads, task % heads
        dots = np.empty(4, value.dtype)
        for n in range(bounds[i], bounds[i + 1]):
            above = grad[n, h]
            for level in range(levels):
                height, width = sizes[i, level, 0], sizes[i, level, 1]
                for p in range(points):
                    x = locations[n, h, level, p, 0] * width - 0.5
                    y = locations[n, h, level, p, 1] * height - 0.5
                    if not (x > -1 and y > -1 and x < width and y < height):
                        grad_weights[n, h, level, p] = 0
                        grad_locations[n, h, level, p, 0] = 0
                        grad_locations[n, h, level, p, 1] = 0
                        continue
                    x0, y0 = math.floor(x), math.floor(y)
                    fx, fy = x - x0, y - y0
                    weight = weights[n, h, level, p]
                    for dy in range(2):
                        row = y0 + dy
                        along_y = weight * (fy if dy == 1 else 1 - fy)
                        for dx in range(2):
                            column = x0 + dx
                            dots[2 * dy + dx] = 0
                            if row < 0 or row >= height or column < 0 or column >= width:
                                continue
                            share = along_y * (fx if dx == 1 else 1 - fx)
                            token = starts[i, level] + row * width + column
                            cell, below = value[token, h], grad_value[token, h]
                            dot = value.dtype.type(0)
                            for c in range(channels):
                                dot += above[c] * cell[c]
                                below[c] += share * above[c]
                            dots[2 * dy + dx] = dot
                    top = (1 - fx) * dots[0] + fx * dots[1]
                    bottom = (1 - fx) * dots[2] + fx * dots[3]
                    grad_weights[n, h, level, p] = (1 - fy) * top + fy * bottom
                    grad_locations[n, h, level, p, 0] = (
                        weight * width * ((1 - fy) * (dots[1] - dots[0]) + fy * (dots[3] - dots[2]))
                    )
                    grad_locations[n, h, level, p, 1] = weight * height * (bottom - top)


class KernelAttention(torch.autograd.Function):
    """Deformable attention through the kernels; float32 or float64 on the CPU."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        packed: PackedLevels,
    ) -> Tensor:
        """Weighted sums of samples, (N, H, C); shapes as above."""
        value, locations, weights = (t.contiguous() for t in (value, locations, weights))
        ctx.save_for_backward(value, locations, weights)
        ctx.packed = packed
        out = value.new_empty(*locations.shape[:2], value.shape[2])
        run_kernel(
            _forward,
            -(-len(locations) // _BLOCK),
            *(value, packed.images, packed.sizes, packed.starts, locations, weights, out),
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN401
        """Gradients of value, locations and weights from one of shape (N, H, C)."""
        value, locations, weights = ctx.saved_tensors
        grads = (torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights))
        packed: PackedLevels = ctx.packed
        count = len(packed.sizes)
        # An image's cells gather gradients from its own queries alone.
        bounds = np.searchsorted(packed.images.numpy(), np.arange(count + 1))
        run_kernel(
            _backward,
            count * value.shape[1],
            *(value, bounds, packed.sizes, packed.starts, locations, weights),
            *(grad.contiguous(), *grads),
        )
        return (*grads, None)
