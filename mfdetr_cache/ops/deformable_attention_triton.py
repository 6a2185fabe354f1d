"""Deformable attention on a GPU, compiled by Triton when it is first used; no build step.

A program computes a block of queries of one head. Samples are weighted as they are read and never
stored, forwards or backwards. Values may be half precision; sums are float32, or float64 where the
values are. Gradients of the values are added by many programs at once: their order, and so their
last bits, vary from run to run.

Arrays as in ``deformable_attention_numba``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfdetr_cache.ops.packed_levels import PackedLevels

# Queries of a program. Sixteen rows of 32 channels fill four warps.
_BLOCK_N = 16
_NUM_WARPS = 4


# Triton reads annotations of its own; arrays and numbers must have none.
@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]  # noqa: PLR0913  the arrays and their sizes
    value,
    images,
    sizes,
    starts,
    locations,
    weights,
    out,
    num_queries,
    heads: tl.constexpr,
    channels: tl.constexpr,
    levels: tl.constexpr,
    points: tl.constexpr,
    block_n: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    h = tl.program_id(1)
    n = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    c = tl.arange(0, block_c)
    real_n, real_c = n < num_queries, c < channels
    of_query = n * heads + h
    of_image = tl.load(images + n, real_n, 0) * levels
    total = tl.zeros([block_n, block_c], locations.dtype.element_ty)
    for level in range(levels):
        height = tl.load(sizes + 2 * (of_image + level))
        width = tl.load(sizes + 2 * (of_image + level) + 1)
        first = tl.load(starts + of_image + level)
        for p in range(points):
            at = of_query * (levels * points) + level * points + p
            x = tl.load(locations + 2 * at, real_n, 0.0) * width - 0.5
            y = tl.load(locations + 2 * at + 1, real_n, 0.0) * height - 0.5
            weight = tl.load(weights + at, real_n, 0.0)
            near = (x > -1) & (y > -1) & (x < width) & (y < height)
            # What is not a number stays so; what is far away gives zero.
            far = (x == x) & (y == y) & (near == 0)
            x, y = tl.where(far, 0.0, x), tl.where(far, 0.0, y)
            weight = tl.where(far, 0.0, weight)
            left, top = tl.floor(x), tl.floor(y)
            fx, fy = x - left, y - top
            x0 = tl.where(near, left, 0.0).to(tl.int32)
            y0 = tl.where(near, top, 0.0).to(tl.int32)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    row, column = y0 + dy, x0 + dx
                    share = weight * (fy if dy else 1 - fy) * (fx if dx else 1 - fx)
                    inside = real_n & near & (row >= 0) & (row < height)
                    inside = inside & (column >= 0) & (column < width)
                    token = first + row * width + column
                    cell = tl.load(
                        value + ((token * heads + h) * channels)[:, None] + c[None, :],
                        inside[:, None] & real_c[None, :],
                        0.0,
                    )
                    total += share[:, None] * cell.to(total.dtype)
    tl.store(
        out + (of_query * channels)[:, None] + c[None, :],
        total.to(out.dtype.element_ty),
        real_n[:, None] & real_c[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]  # noqa: PLR0913  the arrays and their sizes
    value,
    images,
    sizes,
    starts,
    locations,
    weights,
    grad,
    grad_value,
    grad_locations,
    grad_weights,
    num_queries,
    heads: tl.constexpr,
    channels: tl.constexpr,
    levels: tl.constexpr,
    points: tl.constexpr,
    block_n: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    h = tl.program_id(1)
    n = tl.program_id(0).to(tl.int64) * block_n + tl.arange(0, block_n)
    c = tl.arange(0, block_c)
    real_n, real_c = n < num_queries, c < channels
    of_query = n * heads + h
    of_image = tl.load(images + n, real_n, 0) * levels
    above = tl.load(
        grad + (of_query * channels)[:, None] + c[None, :],
        real_n[:, None] & real_c[None, :],
        0.0,
    ).to(locations.dtype.element_ty)
    for level in range(levels):
        height = tl.load(sizes + 2 * (of_image + level))
        width = tl.load(sizes + 2 * (of_image + level) + 1)
        first = tl.load(starts + of_image + level)
        for p in range(points):
            at = of_query * (levels * points) + level * points + p
            x = tl.load(locations + 2 * at, real_n, 0.0) * width - 0.5
            y = tl.load(locations + 2 * at + 1, real_n, 0.0) * height - 0.5
            weight = tl.load(weights + at, real_n, 0.0)
            near = real_n & (x > -1) & (y > -1) & (x < width) & (y < height)
            x, y = tl.where(near, x, 0.0), tl.where(near, y, 0.0)
            left, top = tl.floor(x), tl.floor(y)
            fx, fy = x - left, y - top
            x0, y0 = left.to(tl.int32), top.to(tl.int32)
            of_weight = tl.zeros_like(weight)
            of_x = tl.zeros_like(weight)
            of_y = tl.zeros_like(weight)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    row, column = y0 + dy, x0 + dx
                    along_x, along_y = (fx if dx else 1 - fx), (fy if dy else 1 - fy)
                    inside = near & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                    token = first + row * width + column
                    place = ((token * heads + h) * channels)[:, None] + c[None, :]
                    real = inside[:, None] & real_c[None, :]
                    cell = tl.load(value + place, real, 0.0).to(above.dtype)
                    dot = tl.sum(above * cell, 1)
                    of_weight += along_x * along_y * dot
                    of_x += (along_y if dx else -along_y) * dot
                    of_y += (along_x if dy else -along_x) * dot
                    share = weight * along_x * along_y
                    tl.atomic_add(grad_value + place, share[:, None] * above, real, sem="relaxed")
            tl.store(grad_weights + at, of_weight, real_n)
            tl.store(grad_locations + 2 * at, of_x * weight * width, real_n)
            tl.store(grad_locations + 2 * at + 1, of_y * weight * height, real_n)


class TritonAttention(torch.autograd.Function):
    """Deformable attention through the kernels."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        packed: PackedLevels,
    ) -> Tensor:
        """Weighted sums of samples, (N, H, C) in the dtype of ``value``.

        ``value`` is of any float dtype; locations and weights are both float32 or both float64.
        """
        value, locations, weights = (t.contiguous() for t in (value, locations, weights))
        ctx.save_for_backward(value, locations, weights)
        ctx.packed = packed
        out = value.new_empty(*locations.shape[:2], value.shape[2])
        if len(locations):
            grid, numbers, options = _launch(value, locations)
            arrays = (value, *_layout(packed), locations, weights, out)
            _forward[grid](*arrays, *numbers, **options)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN401
        """Gradients of value, locations and weights from one of shape (N, H, C)."""
        value, locations, weights = ctx.saved_tensors
        of_value = torch.zeros_like(value, dtype=locations.dtype)
        of_locations, of_weights = torch.empty_like(locations), torch.empty_like(weights)
        if len(locations):
            grid, numbers, options = _launch(value, locations)
            arrays = (value, *_layout(ctx.packed), locations, weights, grad.contiguous())
            grads = (of_value, of_locations, of_weights)
            _backward[grid](*arrays, *grads, *numbers, **options)
        return of_value.to(value.dtype), of_locations, of_weights, None


def _launch(
    value: Tensor, locations: Tensor
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
    """Grid, sizes of the arrays, and what a kernel is compiled for."""
    heads, channels = value.shape[1:]
    queries, levels, points = locations.shape[0], locations.shape[2], locations.shape[3]
    grid = (triton.cdiv(queries, _BLOCK_N), heads)
    options = {
        "block_n": _BLOCK_N,
        "block_c": max(16, triton.next_power_of_2(channels)),
        "num_warps": _NUM_WARPS,
    }
    return grid, (queries, heads, channels, levels, points), options


def _layout(packed: PackedLevels) -> tuple[Tensor, Tensor, Tensor]:
    return packed.images, packed.sizes, packed.starts
