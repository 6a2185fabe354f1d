"""Instance masks: COCO run lengths, bitmaps, sampling inside a box, pasting into an image.

Run lengths are COCO's: column-major, alternating background and foreground, starting with
background; they sum to height x width. Pixel (row y, column x) covers [x, x+1) x [y, y+1).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

RunLengths = NDArray[np.uint32]


def run_lengths_of_segmentation(
    segmentation: list[list[float]] | dict[str, Any], size_hw: tuple[int, int]
) -> RunLengths:
    """The run lengths of a COCO ``segmentation`` field, drawn by pycocotools itself.

    Args:
        segmentation: Polygons, or an RLE dictionary with plain or compressed counts.
        size_hw: Height and width of the image in pixels.

    Returns:
        Run lengths, uint32.

    Raises:
        ValueError: If the segmentation is malformed or of another image size.
    """
    height, width = size_hw
    if isinstance(segmentation, list):
        polygons = [p for p in segmentation if len(p) >= 6]
        if not polygons:
            raise ValueError("a polygon needs at least three points")
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    else:
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(f"RLE of size {segmentation.get('size')} in an image of {size_hw}")
        if isinstance(segmentation.get("counts"), list):
            return _checked(np.asarray(segmentation["counts"], dtype=np.uint32), size_hw)
        rle = segmentation
    return _checked(_decompress(rle["counts"]), size_hw)


def _checked(run_lengths: RunLengths, size_hw: tuple[int, int]) -> RunLengths:
    if int(run_lengths.sum(dtype=np.int64)) != size_hw[0] * size_hw[1]:
        raise ValueError(f"run lengths do not sum to {size_hw[0]} x {size_hw[1]} pixels")
    return run_lengths


def _decompress(counts: bytes | str) -> RunLengths:
    """COCO's LEB128-like string as run lengths (the format of pycocotools' rleFrString)."""
    data = counts.encode("ascii") if isinstance(counts, str) else counts
    runs: list[int] = []
    position = 0
    while position < len(data):
        value, shift, more = 0, 0, True
        while more:
            byte = data[position] - 48
            value |= (byte & 0x1F) << shift
            more = bool(byte & 0x20)
            position += 1
            shift += 5
            if not more and byte & 0x10:
                value |= -1 << shift
        # From the third run on, COCO stores the difference to the run before last.
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return np.asarray(runs, dtype=np.uint32)


def compress_run_lengths(run_lengths: RunLengths, size_hw: tuple[int, int]) -> dict[str, Any]:
    """A COCO RLE dictionary as pycocotools takes it.

    Args:
        run_lengths: Run lengths of one mask.
        size_hw: Height and width of the image in pixels.

    Returns:
        ``{"size": [h, w], "counts": bytes}``.
    """
    height, width = size_hw
    plain = {"size": [height, width], "counts": [int(r) for r in run_lengths]}
    rle: dict[str, Any] = coco_mask.frPyObjects(plain, height, width)
    return rle


def decode_run_lengths(run_lengths: RunLengths, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask as a bitmap.

    Args:
        run_lengths: Run lengths of one mask.
        size_hw: Height and width of the image in pixels.

    Returns:
        True inside the object, shape (height, width).

    Examples:
        >>> decode_run_lengths(np.array([1, 2, 1], dtype=np.uint32), (2, 2)).tolist()
        [[False, True], [True, False]]
    """
    height, width = size_hw
    inside = np.arange(len(run_lengths)) % 2 == 1
    mask: NDArray[np.bool_] = np.repeat(inside, run_lengths).reshape(width, height).T
    return mask


def crop_run_lengths(
    run_lengths: RunLengths,
    size_hw: tuple[int, int],
    window_xyxy: tuple[int, int, int, int],
    *,
    flip: bool = False,
) -> RunLengths:
    """The mask inside a window, mirrored if asked for; only the window's columns are drawn.

    Args:
        run_lengths: Run lengths of one mask.
        size_hw: Height and width of its image in pixels.
        window_xyxy: The window in whole pixels; outside the image it is background.
        flip: Mirror the window left to right.

    Returns:
        Run lengths of an image of the window's size.

    Examples:
        >>> runs = np.array([1, 2, 1], dtype=np.uint32)  # columns (0, 1) and (1, 0)
        >>> crop_run_lengths(runs, (2, 2), (0, 0, 2, 2), flip=True).tolist()
        [0, 1, 2, 1]
    """
    height, width = size_hw
    x0, y0, x1, y1 = window_xyxy
    ends: NDArray[np.int64] = np.cumsum(run_lengths, dtype=np.int64)
    # Runs that touch the window's columns, as a bitmap of these columns alone.
    first, last = max(x0, 0) * height, min(x1, width) * height
    clipped: NDArray[np.int64] = np.clip(ends, first, max(first, last))
    lengths: NDArray[np.int64] = np.diff(clipped, prepend=first)
    inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    columns = np.zeros((x1 - x0, y1 - y0), dtype=np.bool_)
    if inside.size:
        part = inside.reshape(-1, height)[:, max(y0, 0) : max(min(y1, height), 0)]
        top, left = max(-y0, 0), max(-x0, 0)
        columns[left : left + part.shape[0], top : top + part.shape[1]] = part
    flat = (columns[::-1] if flip else columns).ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    runs: RunLengths = np.diff(changes, prepend=0, append=flat.size).astype(np.uint32)
    return runs


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A bitmap as a COCO RLE dictionary.

    Args:
        mask: True inside the object, shape (height, width).

    Returns:
        ``{"size": [h, w], "counts": bytes}``.
    """
    rle: dict[str, Any] = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return rle


def sample_run_lengths(
    run_lengths: RunLengths,
    size_hw: tuple[int, int],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Whether points lie inside the object, looked up in the run lengths without a bitmap.

    Args:
        run_lengths: Run lengths of one mask.
        size_hw: Height and width of the image in pixels.
        x: Horizontal positions in original image pixels, any shape.
        y: Vertical positions, same shape.

    Returns:
        True where the pixel under the point is inside; False outside the image.
    """
    height, width = size_hw
    column = np.floor(x).astype(np.int64)
    row = np.floor(y).astype(np.int64)
    in_image = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = np.where(in_image, column * height + row, 0)
    run = np.searchsorted(np.cumsum(run_lengths, dtype=np.int64), index, side="right")
    inside: NDArray[np.bool_] = in_image & (run % 2 == 1)
    return inside


def rasterise_in_boxes(
    run_lengths: Sequence[RunLengths],
    size_hw: tuple[int, int],
    boxes_xyxy: NDArray[np.float64],
    grid_size: int,
    subsamples: int = 2,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The parts of objects inside boxes, as coverage of square grids laid over the boxes.

    Every cell averages ``subsamples`` x ``subsamples`` regularly placed points, so the cost depends
    on the grid and not on the image. All objects of an image are one call without the GIL.

    Args:
        run_lengths: Run lengths of each object.
        size_hw: Height and width of the image in pixels.
        boxes_xyxy: A box for each in original image pixels, shape (R, 4); they may leave the image.
        grid_size: Cells along both axes.
        subsamples: Points per cell along both axes.

    Returns:
        Coverage in [0, 1], shape (R, grid_size, grid_size), rows from top to bottom; the area of
        each object outside its box as a share of the box's area, shape (R,).
    """
    # Imported late: what never trains does without numba's start.
    from mfdetr_cache.ops.masks_numba import coverage_in_boxes

    if not len(run_lengths):
        return np.zeros((0, grid_size, grid_size), np.float32), np.zeros(0, np.float32)
    bounds = np.cumsum([0, *map(len, run_lengths)], dtype=np.int64)
    runs, boxes = np.concatenate(run_lengths), np.asarray(boxes_xyxy, np.float64)
    found: tuple[NDArray[np.float32], NDArray[np.float32]] = coverage_in_boxes(
        runs.astype(np.uint32, copy=False), bounds, size_hw, boxes, grid_size, subsamples
    )
    return found


def paste_mask_in_image(
    mask_probs: NDArray[np.float32],
    box_xyxy: NDArray[np.float64],
    size_hw: tuple[int, int],
    threshold: float = 0.5,
) -> NDArray[np.bool_]:
    """A square mask interpolated to its box in the image and thresholded (Eq. 4).

    Cell centres lie at ``(i + 0.5) / r`` of the box; between them values are bilinear, and between
    the outermost centres and the border of the box they are constant. Pixels whose centre is
    outside the box are outside the mask.

    Args:
        mask_probs: Probabilities, shape (r, r).
        box_xyxy: The box in original image pixels, shape (4,); it may leave the image.
        size_hw: Height and width of the image in pixels.
        threshold: Probability from which on a pixel is inside.

    Returns:
        The mask, shape (height, width); empty when no pixel centre is in the box.
    """
    mask = np.zeros(size_hw, dtype=np.bool_)
    rows, columns, inside = _paste(mask_probs, box_xyxy, size_hw, threshold)
    mask[rows, columns] = inside
    return mask


def run_lengths_in_box(
    mask_probs: NDArray[np.float32],
    box_xyxy: NDArray[np.float64],
    size_hw: tuple[int, int],
    threshold: float = 0.5,
) -> RunLengths:
    """What :func:`paste_mask_in_image` gives, as run lengths and without a bitmap of the image.

    The cost is that of the box, not of the image.

    Args:
        mask_probs: Probabilities, shape (r, r).
        box_xyxy: The box in original image pixels, shape (4,); it may leave the image.
        size_hw: Height and width of the image in pixels.
        threshold: Probability from which on a pixel is inside.

    Returns:
        Run lengths of the whole image, column by column, beginning with background.
    """
    height, width = size_hw
    rows, columns, inside = _paste(mask_probs, box_xyxy, size_hw, threshold)
    bounds = [0, height * width]
    if inside.any():
        # Per column, the rows at which the mask begins or ends; a column ends what it began.
        edges = np.zeros((inside.shape[1], inside.shape[0] + 1), dtype=np.int8)
        edges[:, :-1] = inside.T
        edges[:, 1:] -= inside.T.astype(np.int8)
        column, row = np.nonzero(edges)
        places = (column + columns.start) * height + row + rows.start
        # A run that reaches the bottom and one that begins at the top of the next column are one.
        same = np.flatnonzero(places[1:] == places[:-1])
        places = np.delete(places, np.concatenate((same, same + 1)))
        bounds = [0, *places.tolist(), height * width]
    runs = np.diff(bounds).astype(np.uint32)
    return runs[:-1] if len(runs) > 1 and runs[-1] == 0 else runs


def _paste(
    mask_probs: NDArray[np.float32],
    box_xyxy: NDArray[np.float64],
    size_hw: tuple[int, int],
    threshold: float,
) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Rows and columns of the image that a box covers, and which of its pixels are inside."""
    height, width = size_hw
    x0, y0, x1, y1 = (float(v) for v in box_xyxy)
    rows, row_low, row_high, row_weight = _interpolation(y0, y1, height, mask_probs.shape[0])
    columns, col_low, col_high, col_weight = _interpolation(x0, x1, width, mask_probs.shape[1])
    if rows.stop <= rows.start or columns.stop <= columns.start:
        return slice(0, 0), slice(0, 0), np.zeros((0, 0), dtype=np.bool_)
    down = (
        mask_probs[row_low] * (1 - row_weight)[:, None] + mask_probs[row_high] * row_weight[:, None]
    )
    full = down[:, col_low] * (1 - col_weight) + down[:, col_high] * col_weight
    return rows, columns, full >= threshold


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
