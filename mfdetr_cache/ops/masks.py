"""Instance masks: COCO run lengths, bitmaps, sampling inside a box.

Run lengths are COCO's: column-major, alternating background and foreground, starting with
background; they sum to height x width. Pixel (row y, column x) covers [x, x+1) x [y, y+1).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import faster_coco_eval.mask_api_new_cpp as fast_mask
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

RunLengths = NDArray[np.uint32]

# Run lengths are 32-bit; pycocotools counts fifths of a pixel in 32-bit integers, up to eleven
# times the image away, and keeps ten of them for every pixel of an outline.
_MOST_PIXELS, _LONGEST_SIDE = 2**31 - 1, 1_000_000
_FARTHEST = 10
_LONGEST_OUTLINE = 10_000_000
# 35 bits hold every difference of two run lengths.
_LONGEST_COUNT = 7


def run_lengths_of_segmentation(
    segmentation: Sequence[Sequence[float]] | Mapping[str, Any], size_hw: tuple[int, int]
) -> RunLengths:
    """Run lengths of a COCO ``segmentation``: polygons, or an RLE with plain or compressed counts.

    Drawn by pycocotools; ValueError for a malformed segmentation or one of another image size.
    """
    if not isinstance(segmentation, Mapping):
        return run_lengths_of_polygons(segmentation, size_hw)
    size = list(segmentation.get("size", ()))[:3]
    if size != list(size_hw):
        swapped = (
            "; its size is [width, height], COCO's is [height, width], or the sides of the image "
            "are swapped where it is listed"
        )
        raise ValueError(
            f"RLE of size {size} in an image of {list(size_hw)} (height, width)"
            f"{swapped if size == list(reversed(size_hw)) else ''}"
        )
    return run_lengths_of_counts(segmentation.get("counts"), size_hw)


def run_lengths_of_polygons(
    polygons: Sequence[Sequence[float]], size_hw: tuple[int, int]
) -> RunLengths:
    """Run lengths of the union of polygons ``[x, y, x, y, ...]`` in pixels, drawn by pycocotools.

    pycocotools ends the process, or fills the memory, on unexpected numbers: everything is checked
    before. Polygons of fewer than three points are skipped, and so are those outside the image
    where another one touches it. ValueError if none has three points, or one is malformed or far
    outside.
    """
    height, width = check_size(size_hw)
    outlines = [_outline(p, (height, width)) for p in polygons if len(p) >= 6]
    if not outlines:
        raise ValueError("a polygon needs at least three points")
    drawn = [outline for outline, touches in outlines if touches]
    if not drawn:
        raise ValueError("the polygons lie outside the image")
    rles = coco_mask.frPyObjects(drawn, height, width)
    rle = rles[0] if len(rles) == 1 else coco_mask.merge(rles)
    # It trusts what it reads, which pycocotools wrote.
    return np.array(fast_mask.toUncompressedRLE([rle])[0]["counts"], dtype=np.uint32)


def run_lengths_of_counts(counts: object, size_hw: tuple[int, int]) -> RunLengths:
    """Run lengths of RLE ``counts``: a list, or compressed as text or bytes.

    ValueError if they are malformed or do not sum to height x width.
    """
    height, width = check_size(size_hw)
    runs: NDArray[np.float64] | NDArray[np.int64]
    if isinstance(counts, (str, bytes)):
        runs = _decompress(counts)
    else:
        try:
            runs = np.asarray(counts, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError("the counts of an RLE are a list of numbers, or text") from error
        if runs.ndim != 1 or not np.isfinite(runs).all() or (runs % 1).any():
            raise ValueError("the counts of an RLE are a list of whole numbers, or text")
    if (runs < 0).any():
        raise ValueError("the counts of an RLE must not be negative")
    # Before their sum, which could be more than a number holds.
    if (longest := runs.max(initial=0)) > height * width:
        raise ValueError(f"a run of {longest:.0f} pixels is longer than {height} x {width}")
    if (total := int(runs.sum())) != height * width:
        raise ValueError(f"run lengths do not sum to {height} x {width} pixels but to {total}")
    return runs.astype(np.uint32)


def check_size(size_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the size; ValueError for a side below 1 or too many pixels for run lengths."""
    height, width = size_hw
    if not (1 <= height <= _LONGEST_SIDE and 1 <= width <= _LONGEST_SIDE):
        raise ValueError(f"an image of {height} x {width} pixels (1 to {_LONGEST_SIDE} a side)")
    if height * width > _MOST_PIXELS:
        raise ValueError(f"an image of {height} x {width} pixels (at most {_MOST_PIXELS})")
    return size_hw


def _outline(
    polygon: Sequence[float], size_hw: tuple[int, int]
) -> tuple[NDArray[np.float64], bool]:
    """A polygon that pycocotools can draw, and whether it touches the image."""
    try:
        outline = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("a polygon holds something that is no number") from error
    if outline.ndim != 1 or len(outline) % 2:
        raise ValueError("a polygon is a flat list of x, y, x, y, ...")
    touches, longest_step = True, 0.0
    for axis, side in enumerate(reversed(size_hw)):
        along = outline[axis::2]
        low, high = float(along.min()), float(along.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("a polygon has a coordinate that is not finite")
        touches = touches and high >= 0 and low <= side
        longest_step = max(longest_step, high - low)
        if low < -_FARTHEST * side or high > (1 + _FARTHEST) * side:
            raise ValueError(
                f"a polygon reaches {'xy'[axis]} = {low if low < -side else high:g} "
                f"in an image of {size_hw[1]} x {size_hw[0]} (width x height)"
            )
    points = outline.reshape(-1, 2)
    if len(points) * longest_step > _LONGEST_OUTLINE:  # the others are shorter for certain
        steps = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
        if steps.sum() > _LONGEST_OUTLINE:
            raise ValueError(f"the outline of a polygon is longer than {_LONGEST_OUTLINE} pixels")
    return outline, touches


def _decompress(counts: bytes | str) -> NDArray[np.int64]:
    """COCO's LEB128-like string as run lengths (the format of pycocotools' rleFrString)."""
    try:
        data = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError as error:
        raise ValueError("the counts of an RLE hold a character that is not of an RLE") from error
    groups = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if not len(groups):
        raise ValueError("the counts of an RLE are empty")
    if groups.min() < 0 or groups.max() > 63:
        raise ValueError("the counts of an RLE hold a character that is not of an RLE")
    # Five bits a character, low ones first; the sixth says that more follow.
    ends = np.flatnonzero(groups < 32)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if not len(ends) or ends[-1] != len(groups) - 1 or lengths.max() > _LONGEST_COUNT:
        raise ValueError("the counts of an RLE are cut off or too large")
    position = np.arange(len(groups)) - np.repeat(starts, lengths)
    values = np.add.reduceat((groups & 31) << (5 * position), starts)
    # The highest bit of the last character is the sign.
    values -= ((groups[ends] & 16) << 1) << (5 * (lengths - 1))
    # From the third run on, COCO stores the difference to the run before last.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def compress_run_lengths(run_lengths: RunLengths, size_hw: tuple[int, int]) -> dict[str, Any]:
    """The RLE dictionary of pycocotools, ``{"size": [h, w], "counts": bytes}``."""
    height, width = size_hw
    plain = {"size": [height, width], "counts": run_lengths.tolist()}
    rle: dict[str, Any] = coco_mask.frPyObjects(plain, height, width)
    return rle


def box_of_run_lengths(
    run_lengths: RunLengths, size_hw: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Box x0, y0, x1, y1 around the pixels of a mask; None for an empty mask.

    >>> box_of_run_lengths(np.array([1, 2, 1], dtype=np.uint32), (2, 2))
    (0, 0, 2, 2)
    """
    height = size_hw[0]
    ends: NDArray[np.int64] = np.cumsum(run_lengths, dtype=np.int64)
    last = ends[1::2] - 1
    first = ends[::2][: len(last)]
    first, last = first[last >= first], last[last >= first]
    if not len(first):
        return None
    # A run that goes on in the next column covers the bottom of one and the top of the other.
    whole = bool((first // height != last // height).any())
    top = 0 if whole else int((first % height).min())
    bottom = height if whole else int((last % height).max()) + 1
    return int(first[0] // height), top, int(last[-1] // height) + 1, bottom


def decode_run_lengths(run_lengths: RunLengths, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask as a bitmap, shape (height, width).

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
    """Run lengths of the mask inside a window of whole pixels, optionally mirrored left to right.

    The window may leave the image, which is continued as background. Only its columns are decoded.

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


def plain_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """A compressed COCO RLE as JSON can hold it."""
    counts = rle["counts"]
    return {"size": rle["size"], "counts": counts.decode() if isinstance(counts, bytes) else counts}


def rle_iou(first: Sequence[object], second: Sequence[object]) -> NDArray[np.float64]:
    """IoU of every pair of compressed COCO RLEs, shape (N, M)."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    return np.asarray(coco_mask.iou(list(first), list(second), [0] * len(second)))


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The compressed COCO RLE of a bitmap of shape (height, width)."""
    rle: dict[str, Any] = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return rle


def rasterise_in_boxes(
    run_lengths: Sequence[RunLengths],
    size_hw: tuple[int, int],
    boxes_xyxy: NDArray[np.float64],
    grid_size: int | tuple[int, int],
    subsamples: int = 2,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The parts of objects inside boxes, as coverage of grids laid over the boxes.

    Every cell averages ``subsamples`` x ``subsamples`` regularly placed points, so the cost depends
    on the grid and not on the image. All objects of an image are one call without the GIL.

    Args:
        run_lengths: Run lengths of each object.
        size_hw: Height and width of the image in pixels.
        boxes_xyxy: A box for each in original image pixels, shape (R, 4); they may leave the image.
        grid_size: Cells along both axes, or along the height and the width.
        subsamples: Points per cell along both axes.

    Returns:
        Coverage in [0, 1], shape (R, rows, columns), rows from top to bottom; the area of each
        object outside its box as a share of the box's area, shape (R,).
    """
    # Imported late: what never trains does without numba's start.
    from mfdetr_cache.ops.masks_numba import coverage_in_boxes

    grid_hw = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    if not len(run_lengths):
        return np.zeros((0, *grid_hw), np.float32), np.zeros(0, np.float32)
    bounds = np.cumsum([0, *map(len, run_lengths)], dtype=np.int64)
    runs, boxes = np.concatenate(run_lengths), np.asarray(boxes_xyxy, np.float64)
    found: tuple[NDArray[np.float32], NDArray[np.float32]] = coverage_in_boxes(
        runs.astype(np.uint32, copy=False), bounds, size_hw, boxes, grid_hw, subsamples
    )
    return found
