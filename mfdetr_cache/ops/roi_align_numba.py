"""RoIAlign on a CPU, compiled by numba when it is first used.

torchvision's runs on one thread and goes through the channels plane by plane. Here the channels of
a cell lie next to each other, as the cache stores them, and nothing is permuted. Every region, and
every image's gradient in a block of channels, is computed by one thread in a fixed order: results
do not depend on the number of threads.

Arrays: maps (B, h, w, C), rois (R, 5) image and x0, y0, x1, y1 in input pixels, out (R, r, r, C).
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfdetr_cache.ops.numba_compile import compiled
from mfdetr_cache.ops.numba_threads import FAST, Floats, run_kernel

# Channels that one task of the backward pass owns; a cache line of float32 is 16.
_BLOCK = 32


@compiled(**FAST)
def _samples(
    start: float, length: float, cells: int, bins: int, ratio: int
) -> tuple[Any, Any, Any, int]:
    """Lower cell, upper cell and weight of the upper one, of each sample along an axis.

    A lower cell of -1 marks a sample outside the map, which counts as zero.
    """
    number = ratio if ratio > 0 else max(math.ceil(length / bins), 0)
    low = np.empty(bins * number, np.int64)
    high = np.empty(bins * number, np.int64)
    share = np.empty(bins * number)
    size = length / bins
    for i in range(bins * number):
        at = start + (i // number) * size + (i % number + 0.5) * size / number
        if not (-1 <= at <= cells):
            low[i], high[i], share[i] = -1, -1, 0
            continue
        at = max(at, 0.0)
        low[i] = min(int(at), cells - 1)
        high[i] = min(low[i] + 1, cells - 1)
        share[i] = at - low[i] if high[i] > low[i] else 0
    return low, high, share, number


@compiled(**FAST)
def _forward(
    first_task: int,
    last_task: int,
    maps: Floats,
    rois: Floats,
    scale: float,
    ratio: int,
    out: Floats,
) -> None:
    height, width, channels = maps.shape[1], maps.shape[2], maps.shape[3]
    bins = out.shape[1]
    total = np.empty(channels, maps.dtype)
    for roi in range(first_task, last_task):
        cells = maps[int(rois[roi, 0])]
        x0, y0 = rois[roi, 1] * scale - 0.5, rois[roi, 2] * scale - 0.5
        wide, tall = (rois[roi, 3] - rois[roi, 1]) * scale, (rois[roi, 4] - rois[roi, 2]) * scale
        left, right, along_x, nx = _samples(x0, wide, width, bins, ratio)
        top, bottom, along_y, ny = _samples(y0, tall, height, bins, ratio)
        part = maps.dtype.type(1 / max(nx * ny, 1))
        for row in range(bins):
            for column in range(bins):
                total[:] = 0
                for iy in range(row * ny, row * ny + ny):
                    if top[iy] < 0:
                        continue
                    fy = maps.dtype.type(along_y[iy])
                    for ix in range(column * nx, column * nx + nx):
                        if left[ix] < 0:
                            continue
                        fx = maps.dtype.type(along_x[ix])
                        w00, w01 = (1 - fy) * (1 - fx), (1 - fy) * fx
                        w10, w11 = fy * (1 - fx), fy * fx
                        a, b = cells[top[iy], left[ix]], cells[top[iy], right[ix]]
                        c, d = cells[bottom[iy], left[ix]], cells[bottom[iy], right[ix]]
                        for k in range(channels):
                            total[k] += w00 * a[k] + w01 * b[k] + w10 * c[k] + w11 * d[k]
                here = out[roi, row, column]
                for k in range(channels):
                    here[k] = total[k] * part


@compiled(**FAST)
def _backward(  # noqa: C901  one loop per axis
    first_task: int,
    last_task: int,
    grad: Floats,
    rois: Floats,
    scale: float,
    ratio: int,
    below: Floats,
) -> None:
    height, width, channels = below.shape[1], below.shape[2], below.shape[3]
    bins = grad.shape[1]
    blocks = (channels + _BLOCK - 1) // _BLOCK
    for task in range(first_task, last_task):
        image, first = task // blocks, (task % blocks) * _BLOCK
        last = min(first + _BLOCK, channels)
        cells = below[image]
        for roi in range(len(rois)):
            if int(rois[roi, 0]) != image:
                continue
            x0, y0 = rois[roi, 1] * scale - 0.5, rois[roi, 2] * scale - 0.5
            wide = (rois[roi, 3] - rois[roi, 1]) * scale
            tall = (rois[roi, 4] - rois[roi, 2]) * scale
            left, right, along_x, nx = _samples(x0, wide, width, bins, ratio)
            top, bottom, along_y, ny = _samples(y0, tall, height, bins, ratio)
            part = below.dtype.type(1 / max(nx * ny, 1))
            for iy in range(bins * ny):
                if top[iy] < 0:
                    continue
                fy = below.dtype.type(along_y[iy])
                for ix in range(bins * nx):
                    if left[ix] < 0:
                        continue
                    fx = below.dtype.type(along_x[ix])
                    above = grad[roi, iy // ny, ix // nx]
                    w00, w01 = part * (1 - fy) * (1 - fx), part * (1 - fy) * fx
                    w10, w11 = part * fy * (1 - fx), part * fy * fx
                    a, b = cells[top[iy], left[ix]], cells[top[iy], right[ix]]
                    c, d = cells[bottom[iy], left[ix]], cells[bottom[iy], right[ix]]
                    # One after the other: at a border two of them are the same cell.
                    for k in range(first, last):
                        a[k] += w00 * above[k]
                    for k in range(first, last):
                        b[k] += w01 * above[k]
                    for k in range(first, last):
                        c[k] += w10 * above[k]
                    for k in range(first, last):
                        d[k] += w11 * above[k]


class KernelRoIAlign(torch.autograd.Function):
    """RoIAlign through the kernels; float32 or float64 on the CPU."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        maps: Tensor,
        rois: Tensor,
        size: int,
        scale: float,
        ratio: int,
    ) -> Tensor:
        """From maps (B, C, h, w) and rois (R, 5) to regions (R, r, r, C)."""
        cells, rois = maps.permute(0, 2, 3, 1).contiguous(), rois.contiguous()
        ctx.save_for_backward(rois)
        ctx.shape, ctx.numbers = cells.shape, (scale, ratio)
        out = cells.new_empty(len(rois), size, size, cells.shape[3])
        run_kernel(_forward, len(rois), cells, rois, scale, ratio, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN401
        """Gradient with respect to the maps, from (R, r, r, C) to (B, C, h, w); rois have none."""
        (rois,) = ctx.saved_tensors
        below = grad.new_zeros(ctx.shape)
        tasks = ctx.shape[0] * -(-ctx.shape[3] // _BLOCK)
        run_kernel(_backward, tasks, grad.contiguous(), rois, *ctx.numbers, below)
        return below.permute(0, 3, 1, 2), None, None, None, None
