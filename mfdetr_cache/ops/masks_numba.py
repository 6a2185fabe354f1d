"""Coverage of objects on a grid over their box, compiled by numba when it is first used.

A reader's threads rasterise while others decode and the training computes: without the GIL, and in
half the time that array operations take on so few points (``benchmarks/rasterise.py``).
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.ops.numba_compile import compiled

# No fast mathematics: a point on the edge of a pixel has to fall where plain arithmetic puts it.


@compiled()
def _look_up_column(
    ends: NDArray[np.int64],
    first: int,
    height: int,
    rows: NDArray[np.int64],
    inside: NDArray[np.bool_],
) -> None:
    """Whether rising rows of the column that begins at pixel ``first`` lie inside the object."""
    run = np.searchsorted(ends, first + min(max(rows[0], 0), height - 1), side="right")
    for i in range(len(rows)):
        inside[i] = False
        if rows[i] < 0 or rows[i] >= height:
            continue
        # The points of a column go down, and so do the runs.
        while run < len(ends) and ends[run] <= first + rows[i]:
            run += 1
        inside[i] = run % 2 == 1


@compiled()
def coverage_in_box(
    run_lengths: NDArray[np.uint32],
    height: int,
    width: int,
    box_xyxy: NDArray[np.float64],
    grid_hw: tuple[int, int],
    subsamples: int,
) -> NDArray[np.float32]:
    """Fraction of the sampled points of every cell inside an object, shape (rows, columns).

    ``box_xyxy`` is in original image pixels and may leave the image; ``subsamples`` points per cell
    along both axes.
    """
    ends = np.empty(len(run_lengths), np.int64)
    total = 0
    for i in range(len(run_lengths)):
        total += int(run_lengths[i])
        ends[i] = total
    down, across = grid_hw[0] * subsamples, grid_hw[1] * subsamples
    x0, y0, x1, y1 = box_xyxy
    rows = np.empty(down, np.int64)
    for i in range(down):
        rows[i] = math.floor(y0 + (i + 0.5) / down * (y1 - y0))
    # Column by column, as the points are looked up.
    counts = np.zeros((grid_hw[1], grid_hw[0]), np.float32)
    inside = np.zeros(down, np.bool_)
    before = -1
    for j in range(across):
        column = math.floor(x0 + (j + 0.5) / across * (x1 - x0))
        if column < 0 or column >= width:
            continue
        if column != before:
            before = column
            _look_up_column(ends, column * height, height, rows, inside)
        cell = j // subsamples
        for i in range(grid_hw[0]):
            for k in range(i * subsamples, (i + 1) * subsamples):
                counts[cell, i] += inside[k]
    return counts.T / np.float32(subsamples * subsamples)


@compiled()
def coverage_in_boxes(
    run_lengths: NDArray[np.uint32],
    bounds: NDArray[np.int64],
    size_hw: tuple[int, int],
    boxes_xyxy: NDArray[np.float64],
    grid_hw: tuple[int, int],
    subsamples: int,
) -> tuple[Any, Any]:
    """:func:`coverage_in_box` for R objects, float32, shape (R, rows, columns).

    Also each object's area outside its box as a fraction of the box's area, float32, shape (R,).
    ``run_lengths`` are concatenated; ``bounds`` are their offsets, shape (R + 1,).
    """
    count = len(boxes_xyxy)
    masks = np.empty((count, grid_hw[0], grid_hw[1]), np.float32)
    outside = np.empty(count, np.float32)
    for r in range(count):
        runs = run_lengths[bounds[r] : bounds[r + 1]]
        box = boxes_xyxy[r]
        masks[r] = coverage_in_box(runs, size_hw[0], size_hw[1], box, grid_hw, subsamples)
        area = 0.0
        for i in range(1, len(runs), 2):
            area += runs[i]
        inside = 0.0
        for i in range(grid_hw[0]):
            for j in range(grid_hw[1]):
                inside += masks[r, i, j]
        share = area / max((box[2] - box[0]) * (box[3] - box[1]), 1e-6)
        outside[r] = max(share - inside / (grid_hw[0] * grid_hw[1]), 0.0)
    return masks, outside
