"""What the four numbers of a ``bbox`` mean: COCO's x, y, width, height, or another tool's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mfdetr_cache.errors import DatasetError

Box = tuple[float, float, float, float]
Corners = tuple[int, int, int, int]
Size = tuple[int, int]
_Kind = Literal["size", "corners", "rows", "centre"]
_Masked = tuple[Box, Corners, Size]

# A box this far from its mask's box, in pixels and in parts of its side, is still of that mask.
_SLACK_PIXELS, _SLACK_SHARE = 2.0, 0.05
# Boxes are read in another form when so many times more of them fit that way.
_CLEAR_MAJORITY, _SHARE_WORTH_A_LOOK = 9, 0.05
# Without masks: this part of the boxes leaves the image as xywh, and all are corners inside it.
_LEAVING_SHARE = 0.2
# Boxes within the first pixel of images that are larger are in parts of their sides.
_LEAST_SIDE = 8
_TEXTS = {"size": "x, y, width, height", "corners": "x0, y0, x1, y1"}
_TEXTS |= {"centre": "the centre's x, y, then width, height", "rows": "y0, x0, y1, x1"}


@dataclass(frozen=True, slots=True)
class BoxForm:
    """A form of boxes, in pixels or in parts of the image's sides.

    ``kind`` is x, y, width, height; both corners; these with y before x, as TensorFlow has them; or
    centre, width, height.
    """

    kind: _Kind = "size"
    in_parts: bool = False

    @property
    def said(self) -> str:
        """What is told of boxes in this form; nothing of COCO's own."""
        if self == COCO_FORM:
            return ""
        parts = " in parts of the image's sides" if self.in_parts else ""
        return (
            f"bbox is {_TEXTS[self.kind]}{parts} (COCO's is x, y, width, height in pixels) and "
            "read so"
        )

    def to_xywh(self, box: Box, size_hw: Size) -> Box:
        """A box in this form as x, y, width, height in pixels."""
        if self.kind == "rows":
            box = (box[1], box[0], box[3], box[2])
        height, width = size_hw if self.in_parts else (1, 1)
        x, y, w, h = box[0] * width, box[1] * height, box[2] * width, box[3] * height
        if self.kind in ("corners", "rows"):
            return x, y, w - x, h - y
        return (x - w / 2, y - h / 2, w, h) if self.kind == "centre" else (x, y, w, h)


COCO_FORM = BoxForm()
_KINDS: tuple[_Kind, ...] = ("size", "corners", "rows", "centre")
_OTHERS = [form for p in (False, True) for k in _KINDS if (form := BoxForm(k, p)) != COCO_FORM]


def form_of_boxes(boxes: Iterable[tuple[Box | None, Corners | None, Size]], file: str) -> BoxForm:
    """The form of the boxes of a file.

    Of each there is the ``bbox`` as written, the corners of its mask, and height and width of the
    image. Masks decide where there are any: nearly all boxes must be their mask's in another form
    and not in COCO's. Without masks corners are told by what leaves the image otherwise.
    DatasetError if boxes without masks are in parts of the image's sides: which four numbers they
    are cannot be told.
    """
    seen = [(box, mask, size) for box, mask, size in boxes if box is not None]
    fitting: list[_Masked] = []
    others: list[_Masked] = []
    for box, mask, size in seen:
        if mask is not None:
            (fitting if is_close(box, mask) else others).append((box, mask, size))
    if fitting or others:
        fits = {form: sum(_fits(form, one) for one in others) for form in _OTHERS}
        best = max(_OTHERS, key=fits.__getitem__)
        # Whatever fits both ways says nothing; it is looked at only where it could matter.
        if fits[best] >= _SHARE_WORTH_A_LOOK * len(fitting):
            contrary = sum(not _fits(best, one) for one in fitting)
            if fits[best] > _CLEAR_MAJORITY * contrary and 2 * fits[best] > len(others):
                return best
        if fitting or fits[best]:
            return COCO_FORM
    within = (min(box) >= 0 and max(box) <= 1 and min(hw) >= _LEAST_SIDE for box, _, hw in seen)
    if seen and all(within):
        raise DatasetError(
            f"{file}: every bbox lies between 0 and 1, as in parts of the image's sides; write x, "
            "y, width, height in pixels"
        )
    plain = [(box, size) for box, _, size in seen]
    return BoxForm("corners") if not others and _are_corners(plain) else COCO_FORM


def _fits(form: BoxForm, one: _Masked) -> bool:
    box, mask, size_hw = one
    return is_close(form.to_xywh(box, size_hw), mask)


def _are_corners(boxes: Sequence[tuple[Box, Size]]) -> bool:
    """Whether all boxes are corners inside their image, and many leave it as x, y, w, h."""
    leaving = 0
    for (x, y, w, h), (height, width) in boxes:
        right, bottom = 1.01 * width + 1, 1.01 * height + 1
        if not (0 <= x < w <= right and 0 <= y < h <= bottom):
            return False
        leaving += x + w > right or y + h > bottom
    return bool(boxes) and leaving >= max(1, _LEAVING_SHARE * len(boxes))


def is_close(box: Box, mask: Box) -> bool:
    """Whether x, y, width, height are those of a mask's corners, but for some slack."""
    side = max(mask[2] - mask[0], mask[3] - mask[1])
    corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    apart = max(abs(a - b) for a, b in zip(corners, mask, strict=True))
    return apart <= _SLACK_PIXELS + _SLACK_SHARE * side


def overlap(box: Box, corners: Corners) -> float:
    """The IoU of x, y, width, height and of corners."""
    x, y, w, h = box
    x0, y0, x1, y1 = corners
    across = max(0.0, min(x + w, x1) - max(x, x0))
    down = max(0.0, min(y + h, y1) - max(y, y0))
    return across * down / (w * h + (x1 - x0) * (y1 - y0) - across * down)


def four_numbers(value: object) -> Box | None:
    """A ``bbox`` field, a list or one as text, as four finite numbers; None for anything else.

    Examples:
        >>> four_numbers("[1, 2.5, 3, 4]") == four_numbers("1. 2.5 3. 4.") == (1, 2.5, 3, 4)
        True
    """
    if isinstance(value, str):
        value = value.strip("[]() ").replace(",", " ").split()
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return None
    numbers = [finite_number(v) for v in value]
    if any(n is None for n in numbers):
        return None
    x, y, w, h = (float(n or 0) for n in numbers)
    return x, y, w, h


def finite_number(value: object) -> float | None:
    """A number, also one as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
