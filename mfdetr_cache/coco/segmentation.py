"""The ``segmentation`` of an annotation or a result, in every form that tools write it."""

import ast
import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import numpy as np
from pycocotools import mask as coco_mask

from mfdetr_cache.coco.box_forms import Box, Corners, Size, finite_number, is_close, overlap
from mfdetr_cache.coco.faults import short
from mfdetr_cache.ops.masks import (
    RunLengths,
    box_of_run_lengths,
    compress_run_lengths,
    run_lengths_of_counts,
    run_lengths_of_polygons,
    run_lengths_of_segmentation,
)

# What is said of polygons in parts of the image's sides.
IN_PARTS = "polygons are in parts of the image's sides (COCO's are in pixels) and read so"
# Annotators draw this far beyond an image, in parts of its sides.
_BEYOND = 0.1
# From this share on, polygons within the first pixel are no accident.
_SOME = 0.02
_NO_RUNS = np.zeros(0, dtype=np.uint32)


@dataclass(frozen=True, slots=True)
class Mask:
    """The mask of an entry, and the corners around it; false, with no run lengths, if it has none.

    ``in_parts``: it was written in parts of the image's sides.
    """

    run_lengths: RunLengths
    box_xyxy: Corners | None
    in_parts: bool

    def __bool__(self) -> bool:
        return len(self.run_lengths) > 0

    @property
    def num_pixels(self) -> int:
        """How many pixels are inside."""
        return int(self.run_lengths[1::2].sum(dtype=np.int64))

    def fits_in_rows(self, box: Box, size_hw: Size) -> bool:
        """Whether a box, in xywh, is that of an RLE, were its runs along the rows of the image."""
        # Rows of the image are the columns of its transpose.
        turned = box_of_run_lengths(self.run_lengths, size_hw[::-1])
        if turned is None:
            return False
        y0, x0, y1, x1 = turned
        return overlap(box, (x0, y0, x1, y1)) >= 0.5


class Segmentations:
    """Reads the ``segmentation`` of each entry of a file, of which all ``values`` are given.

    Its polygons may be YOLO's, in parts of the image's sides, all or some of them: they lie between
    0 and 1. What is no list does not tell, nor do whole numbers: of a pixel, or of nothing.
    """

    def __init__(self, values: Iterable[object]) -> None:
        units = Counter(_unit(_plain(value)) for value in values)
        parts, pixels = units["parts"], units["pixels"]
        self.all_in_parts = parts > 0 and not pixels
        self._some_in_parts = parts > max(1, _SOME * pixels)

    def read(self, value: object, box: Box | None, size_hw: Size) -> Mask:
        """The mask of an entry beside its ``bbox``; ValueError if it cannot be understood."""
        value = _plain(value)
        in_parts = self._is_in_parts(value, box, size_hw)
        runs = _run_lengths(_in_pixels(value, size_hw) if in_parts else value, size_hw)
        if runs is None:
            return Mask(_NO_RUNS, None, in_parts)
        return Mask(runs, box_of_run_lengths(runs, size_hw), in_parts)

    def _is_in_parts(self, value: object, box: Box | None, size_hw: Size) -> bool:
        """Whether polygons are; beside others in pixels, a ``bbox`` must not say otherwise."""
        if self.all_in_parts or not self._some_in_parts or _unit(value) != "parts":
            return self.all_in_parts and isinstance(value, list)
        numbers: list[Any] = _flat(_in_pixels(value, size_hw))
        x, y = numbers[::2], numbers[1::2]
        return box is None or max(box) <= 1 or is_close(box, (min(x), min(y), max(x), max(y)))


def _unit(value: object) -> Literal["parts", "pixels", ""]:
    """The unit of polygons; empty where nothing tells it."""
    if not isinstance(value, list):
        return ""
    first: object = value
    while isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, (int, float)) and first > 1 + _BEYOND:
        return "pixels"  # most need no look at the others
    numbers = _flat(value)
    if not all(isinstance(v, (int, float)) and -_BEYOND <= v <= 1 + _BEYOND for v in numbers):
        return "pixels"
    return "parts" if any(isinstance(v, float) and v % 1 for v in numbers) else ""


def _flat(value: object) -> list[object]:
    """What is in lists of any depth; null, as of a polygon that is none, is nothing."""
    if not isinstance(value, list):
        return [] if value is None else [value]
    return [v for item in value for v in _flat(item)]


def _in_pixels(value: object, size_hw: Size) -> object:
    """Polygons in parts of the image's sides, in pixels; anything else as it is."""
    if not isinstance(value, list):
        return value
    return [
        v * size_hw[1 - i % 2] if isinstance(v, (int, float)) else _in_pixels(v, size_hw)
        for i, v in enumerate(value)
    ]


def _run_lengths(value: object, size_hw: Size) -> RunLengths | None:
    """The mask of a ``segmentation`` field, as in a JSON file.

    Besides COCO's own forms: one polygon that is not in a list or in one list too many, points as
    pairs, RLE dictionaries in a list, and the counts of an RLE alone. None where there is no mask:
    null, NaN, no text, no polygon, only empty ones. ValueError if there is something, and it is no
    mask of an image of this size.
    """
    if isinstance(value, ValueError):  # what the reader of another layout found
        raise value
    if isinstance(value, str):
        return _of_text(value.strip(), size_hw)
    if isinstance(value, Mapping):
        return _of_rle(value, size_hw)
    # Null, or the NaN of a data frame.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, Sequence):
        raise ValueError(f"a segmentation is a list of polygons or an RLE, not {short(value)}")
    if value and all(isinstance(item, Mapping) for item in value):
        return _of_rles(value, size_hw)
    polygons = _polygons(value)
    return run_lengths_of_polygons(polygons, size_hw) if polygons else None


def _plain(value: object) -> object:
    """What stands in a text, as JSON or Python; in lists, points ``{"x", "y"}`` as pairs.

    Numbers as text, too, are numbers there.
    """
    if isinstance(value, str) and isinstance(inner := _unwritten(value), (list, dict)):
        value = inner
    first = value
    while isinstance(first, list) and first:
        first = first[0]
    is_other = isinstance(value, list) and (isinstance(first, str) or _is_xy(first))
    return _in_numbers(value) if is_other else value


def _in_numbers(value: object) -> object:
    """Points as pairs, and texts as the numbers that they are, in any lists."""
    if isinstance(value, list):
        return [_in_numbers(v) for v in value]
    if _is_xy(value):
        return [_in_numbers(value["x"]), _in_numbers(value["y"])]
    number = finite_number(value) if isinstance(value, str) else None
    return value if number is None else number


def _is_xy(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether it is one point; the coordinates of all in two lists are none."""
    return (
        isinstance(value, Mapping)
        and value.keys() == {"x", "y"}
        and not any(isinstance(v, (list, Mapping)) for v in value.values())
    )


def _polygons(value: Sequence[Any]) -> list[list[float]]:
    """Polygons as flat lists of coordinates; empty ones are left out."""
    parts = [item for item in value if item not in (None, [])]
    while len(parts) == 1 and _is_list(parts[0]) and len(parts[0]) == 1 and _is_list(parts[0][0]):
        parts = parts[0]  # one list too many
    if parts and not any(map(_is_list, parts)):
        return [_numbers(value)]  # one polygon that is not in a list
    if len(parts) >= 3 and all(_is_point(item) for item in parts):
        return [_numbers([v for point in parts for v in point])]
    polygons = []
    for part in parts:
        if not _is_list(part):
            raise ValueError(f"a polygon is a list of coordinates, not {short(part)}")
        pairs = all(_is_point(item) for item in part)
        polygons.append(_numbers([v for point in part for v in point] if pairs else part))
    return polygons


def _is_list(item: object) -> bool:
    return isinstance(item, list)


def _is_point(item: object) -> bool:
    if not isinstance(item, list) or len(item) != 2:
        return False
    return not any(isinstance(v, (list, Mapping)) for v in item)


def _numbers(values: Sequence[Any]) -> list[float]:
    if not set(map(type, values)) <= {int, float, str}:
        raise ValueError(f"a polygon holds something that is no number: {short(values)}")
    try:
        return list(map(float, values))
    except (ValueError, OverflowError) as error:
        raise ValueError("a polygon holds something that is no number") from error


def _of_text(text: str, size_hw: Size) -> RunLengths | None:
    """The mask that compressed counts are; None for a text that says that there is none."""
    if text in ("", "null", "None", "nan", "NaN"):
        return None
    try:
        return run_lengths_of_counts(_plain_counts(text), size_hw)
    except ValueError as error:
        raise ValueError(
            f"the text {short(text)} is neither JSON nor the counts of an RLE ({error})"
        ) from error


def _unwritten(text: str) -> object:
    """What a text is as JSON, else as Python's ``str`` writes a list or dictionary; or None."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return _without_tuples(read(text))
    return None


def _without_tuples(value: object) -> object:
    """Lists in place of tuples, in any lists."""
    return [_without_tuples(v) for v in value] if isinstance(value, (list, tuple)) else value


def _of_rle(value: Mapping[str, Any], size_hw: Size) -> RunLengths | None:
    counts = value.get("counts")
    if value.keys() - {"size", "counts"} and counts is None:
        raise ValueError(f"{short(value)} is no RLE, which has size and counts")
    if counts is None or (isinstance(counts, (str, bytes, list)) and not counts):
        return None
    rle = {"size": size_hw, "counts": _plain_counts(counts)}
    if (size := value.get("size")) is not None:
        try:
            rle["size"] = [int(v) if float(v).is_integer() else v for v in size]
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"an RLE of size {short(size)}; it is [height, width]") from error
    return run_lengths_of_segmentation(rle, size_hw)


def _of_rles(values: Sequence[Any], size_hw: Size) -> RunLengths | None:
    """The union of RLE dictionaries in a list."""
    parts = [runs for v in values if (runs := _of_rle(v, size_hw)) is not None]
    if len(parts) <= 1:
        return parts[0] if parts else None
    merged = coco_mask.merge([compress_run_lengths(runs, size_hw) for runs in parts])
    return run_lengths_of_counts(merged["counts"], size_hw)


def _plain_counts(counts: object) -> object:
    """Counts without what Python's ``str`` puts around bytes, as in ``"b'ab1'"``."""
    counts = counts.strip() if isinstance(counts, str) else counts
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):
        try:
            return ast.literal_eval(counts)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return counts
    return counts
