"""Square masks pasted into their image, in memory of their box alone.

Pixel (row y, column x) covers [x, x+1) x [y, y+1).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.ops.masks import RunLengths

# Pixels that are interpolated at a time.
_STRIP_PIXELS = 2**20


def paste_probabilities_in_image(
    mask_probs: NDArray[np.float32], box_xyxy: NDArray[np.float64], size_hw: tuple[int, int]
) -> NDArray[np.uint8]:
    """What :func:`run_lengths_in_box` thresholds, in 255 steps; 0 outside the box.

    Rounded, and so that 128 and more is where a probability is 0.5 or more.
    """
    image = np.zeros(size_hw, dtype=np.uint8)
    for rows, columns, probs in _paste(mask_probs, box_xyxy, size_hw):
        image[rows, columns] = np.minimum(255, probs * 255 + 0.5)
    return image


def run_lengths_in_box(
    mask_probs: NDArray[np.float32], box_xyxy: NDArray[np.float64], size_hw: tuple[int, int]
) -> RunLengths:
    """A square mask interpolated to its box in the image: where it is 0.5 or more (Eq. 4).

    Cell centres lie at ``(i + 0.5) / r`` of the box; between them values are bilinear, and between
    the outermost centres and the border of the box they are constant. Pixels whose centre is
    outside the box are outside the mask. Costs what the box does, not the image.

    Args:
        mask_probs: Probabilities, shape (r, r).
        box_xyxy: The box in original image pixels, shape (4,); it may leave the image.
        size_hw: Height and width of the image in pixels.
    """
    height, width = size_hw
    places = [
        _edges(probs >= 0.5, rows.start, columns.start, height)
        for rows, columns, probs in _paste(mask_probs, box_xyxy, size_hw)
    ]
    edges = np.concatenate([np.zeros(0, np.int64), *places])
    # A run that reaches the bottom and one that begins at the top of the next column are one.
    same = np.flatnonzero(edges[1:] == edges[:-1])
    edges = np.delete(edges, np.concatenate((same, same + 1)))
    runs = np.diff(edges, prepend=0, append=height * width).astype(np.uint32)
    return runs[:-1] if len(runs) > 1 and runs[-1] == 0 else runs


def _edges(
    inside: NDArray[np.bool_], first_row: int, first_column: int, height: int
) -> NDArray[np.int64]:
    """Where in the image, column by column, the mask of a strip begins and ends."""
    # Per column, the rows at which the mask begins or ends; a column ends what it began.
    edges = np.zeros((inside.shape[1], inside.shape[0] + 1), dtype=np.int8)
    edges[:, :-1] = inside.T
    edges[:, 1:] -= inside.T.astype(np.int8)
    column, row = np.nonzero(edges)
    positions: NDArray[np.int64] = (column + first_column) * height + row + first_row
    return positions


def _paste(
    mask_probs: NDArray[np.float32],
    box_xyxy: NDArray[np.float64],
    size_hw: tuple[int, int],
) -> Iterator[tuple[slice, slice, NDArray[np.floating]]]:
    """Rows and columns of the image that a box covers, and their probabilities, in strips."""
    height, width = size_hw
    x0, y0, x1, y1 = (float(v) for v in box_xyxy)
    rows, row_low, row_high, row_weight = _interpolation(y0, y1, height, mask_probs.shape[0])
    columns, low, high, weight = _interpolation(x0, x1, width, mask_probs.shape[1])
    if rows.stop <= rows.start or columns.stop <= columns.start:
        return
    down = (
        mask_probs[row_low] * (1 - row_weight)[:, None] + mask_probs[row_high] * row_weight[:, None]
    )
    step = max(1, _STRIP_PIXELS // len(down))
    for first in range(0, len(low), step):
        strip = slice(first, first + step)
        full = down[:, low[strip]] * (1 - weight[strip]) + down[:, high[strip]] * weight[strip]
        start = columns.start + first
        yield rows, slice(start, start + full.shape[1]), full


def _interpolation(
    start: float, stop: float, length: int, cells: int
) -> tuple[slice, NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Pixels of an axis with centre in [start, stop], and the two cells and weight of each."""
    first = max(0, int(np.ceil(start - 0.5)))
    last = min(length, int(np.floor(stop - 0.5)) + 1)
    centres = np.arange(first, max(first, last)) + 0.5
    position = (centres - start) / max(stop - start, 1e-9) * cells - 0.5
    position = np.clip(position, 0, cells - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, cells - 1)
    return slice(first, last), low, high, (position - low).astype(np.float32)
