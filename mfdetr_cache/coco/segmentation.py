"""The ``segmentation`` of an annotation or a result, in every form that tools write it."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pycocotools import mask as coco_mask

from mfdetr_cache.coco.faults import short
from mfdetr_cache.ops.masks import (
    RunLengths,
    compress_run_lengths,
    run_lengths_of_counts,
    run_lengths_of_polygons,
    run_lengths_of_segmentation,
)


def read_segmentation(value: object, size_hw: tuple[int, int]) -> RunLengths | None:
    """The mask of a ``segmentation`` field.

    Besides COCO's own forms: one polygon that is not in a list, points as pairs, RLE dictionaries
    in a list, and any of these as text.

    Args:
        value: As in a JSON file.
        size_hw: Height and width of the image in pixels.

    Returns:
        Run lengths; None where there is no mask: null, no text, no polygon, only empty ones.

    Raises:
        ValueError: If there is something, and it is no mask of an image of this size.
    """
    if isinstance(value, (str, bytes)):
        return _of_text(value, size_hw)
    if isinstance(value, Mapping):
        return _of_rle(value, size_hw)
    if value is None:
        return None
    if not isinstance(value, Sequence):
        raise ValueError(f"a segmentation is a list of polygons or an RLE, not {short(value)}")
    if value and all(isinstance(item, Mapping) for item in value):
        return _of_rles(value, size_hw)
    polygons = _polygons(value)
    return run_lengths_of_polygons(polygons, size_hw) if polygons else None


def _polygons(value: Sequence[Any]) -> list[list[float]]:
    """Polygons as flat lists of coordinates; empty ones are left out."""
    if value and not any(isinstance(item, (list, tuple)) for item in value):
        return [_numbers(value)]  # one polygon that is not in a list
    parts = [item for item in value if item or not isinstance(item, (list, tuple))]
    if len(parts) >= 3 and all(_is_point(item) for item in parts):
        return [_numbers([v for point in parts for v in point])]
    polygons = []
    for part in parts:
        if not isinstance(part, (list, tuple)):
            raise ValueError(f"a polygon is a list of coordinates, not {short(part)}")
        pairs = all(_is_point(item) for item in part)
        polygons.append(_numbers([v for point in part for v in point] if pairs else part))
    return polygons


def _is_point(item: object) -> bool:
    return (
        isinstance(item, (list, tuple))
        and len(item) == 2
        and not any(isinstance(v, (list, tuple, Mapping)) for v in item)
    )


def _numbers(values: Sequence[Any]) -> list[float]:
    if not set(map(type, values)) <= {int, float, str}:
        raise ValueError("a polygon holds something that is no number")
    try:
        return list(map(float, values))
    except (ValueError, OverflowError) as error:
        raise ValueError("a polygon holds something that is no number") from error


def _of_text(value: str | bytes, size_hw: tuple[int, int]) -> RunLengths | None:
    """A mask as text: JSON of another form, or the compressed counts of an RLE alone."""
    text = value.strip()
    if not text or text in ("null", "None", b"null", b"None"):
        return None
    try:
        inner = json.loads(text)
    except (ValueError, RecursionError):
        inner = None
    if isinstance(inner, (list, dict)):
        return read_segmentation(inner, size_hw)
    try:
        return run_lengths_of_counts(_plain_counts(text), size_hw)
    except ValueError as error:
        raise ValueError(
            f"the text {short(value)} is neither JSON nor the counts of an RLE ({error})"
        ) from error


def _of_rle(value: Mapping[str, Any], size_hw: tuple[int, int]) -> RunLengths | None:
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


def _of_rles(values: Sequence[Any], size_hw: tuple[int, int]) -> RunLengths | None:
    """The union of RLE dictionaries in a list."""
    parts = [runs for v in values if (runs := _of_rle(v, size_hw)) is not None]
    if len(parts) <= 1:
        return parts[0] if parts else None
    merged = coco_mask.merge([compress_run_lengths(runs, size_hw) for runs in parts])
    return run_lengths_of_counts(merged["counts"], size_hw)


def _plain_counts(counts: object) -> object:
    """Counts without what Python's ``str`` puts around bytes, as in ``"b'ab1'"``."""
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):
        try:
            return ast.literal_eval(counts)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return counts
    return counts
