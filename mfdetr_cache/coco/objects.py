"""The ``annotations`` of a COCO document, checked, repaired where that is certain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfdetr_cache.coco.box_forms import (
    Box,
    BoxForm,
    Size,
    finite_number,
    form_of_boxes,
    four_numbers,
    overlap,
)
from mfdetr_cache.coco.categories import by_names_too, known_category
from mfdetr_cache.coco.faults import Faults, Unusable, keys_of, short
from mfdetr_cache.coco.ids import SourceId, internal_ids, known_image, source_id
from mfdetr_cache.coco.image_list import Category, ImageEntry
from mfdetr_cache.coco.segmentation import IN_PARTS, Mask, Segmentations
from mfdetr_cache.ops.masks import RunLengths

_FARTHEST = 10
# Areas of polygons this small are not the number of their pixels.
_FEW_PIXELS = 16
# COCO has 1 % of them.
_MANY_CROWDS = 0.2
_MANY_RECTANGLES = 0.9
_RECTANGLE = (
    "the mask is a whole rectangle, as where boxes were exported as polygons: not its shape"
)
_OTHER_AREA = "area is not that of mask or bbox; APS, APM and APL go by it, kept as it is"
_OTHER_BOX = "bbox does not fit the mask (IoU below 0.5), kept as it is"
_FIRST_PIXEL = "bbox lies in the first pixel, as in parts of the image's sides, kept as it is"
IN_ROWS = "bbox fits the mask only if its runs went row by row (COCO's go down the columns), kept"
_IGNORED = "marked 'ignore', which changes nothing in COCO (iscrowd 1 does)"


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotated object; box and area are in pixels.

    Its id is the file's where all can be used, else its number from 1. ``run_lengths`` are of
    length 0 where it has a box only.
    """

    annotation_id: int
    image_id: int
    category_id: int
    box_xywh: Box
    area: float
    is_crowd: bool
    run_lengths: RunLengths


@dataclass(slots=True)
class _Draft:
    """An annotation before its box is understood."""

    where: str
    number: SourceId | None
    entry: ImageEntry
    category: Category
    is_crowd: bool
    mask: Mask
    box: Box | None
    raw: Mapping[str, Any]


def read_annotations(
    raw: Sequence[Any],
    images: Mapping[SourceId, ImageEntry],
    named: Mapping[SourceId, SourceId],
    categories: Mapping[SourceId, Category],
    faults: Faults,
    *,
    needs_mask: bool,
) -> list[Annotation]:
    """The annotations of some images that can be used, in the order of the file.

    Images and categories have their ids as written. ``named`` has those of all images of the file;
    of the ones that are not in ``images`` nothing is wanted. ``faults`` takes down what cannot be
    used, also for want of a mask, and what is repaired.
    """
    masks = Segmentations(a.get("segmentation") for a in raw if isinstance(a, dict))
    categories = by_names_too(categories)
    drafts = []
    for number, annotation in enumerate(raw):
        image_id = None
        if isinstance(annotation, dict):
            image_id = known_image(annotation.get("image_id"), named)
        if image_id is not None and image_id not in images:
            continue
        faults.total += 1
        entry = None if image_id is None else images[image_id]
        with faults:
            draft = _draft(number, annotation, entry, categories, faults, masks)
            if needs_mask and not draft.mask:
                written = short(draft.raw.get("segmentation"))
                raise Unusable(draft.where, f"has no mask (segmentation {written})")
            drafts.append(draft)
    seen = ((d.box, d.mask.box_xyxy, d.entry.size_hw) for d in drafts)
    form = form_of_boxes(seen, faults.file)
    if form.said:
        for draft in drafts:
            if draft.box is not None:
                faults.repair(draft.where, form.said)
    finished = []
    for draft, own in zip(drafts, internal_ids([d.number for d in drafts]), strict=True):
        with faults:
            finished.append((draft, _finished(draft, own, faults, form)))
    _notice_together(finished, faults)
    return [annotation for _, annotation in finished]


def _notice_together(finished: Sequence[tuple[_Draft, Annotation]], faults: Faults) -> None:
    """Notice what no annotation tells alone: it is there twice, many are crowds, or no shapes."""
    seen: set[int] = set()
    drafts = [draft for draft, _ in finished]
    drawn = [(d, box) for d in drafts if (box := d.mask.box_xyxy) is not None]
    filled = [d for d, (x0, y0, x1, y1) in drawn if d.mask.num_pixels == (x1 - x0) * (y1 - y0)]
    if len(filled) > _MANY_RECTANGLES * len(drawn):
        for draft in filled:
            faults.notice(draft.where, _RECTANGLE)
    many_crowds = sum(d.is_crowd for d in drafts) > _MANY_CROWDS * len(drafts)
    for draft, a in finished:
        same = hash((a.image_id, a.category_id, a.box_xywh, a.run_lengths.tobytes()))
        if same in seen:
            faults.notice(draft.where, "box and mask are those of another, so it counts twice")
        seen.add(same)
        if many_crowds and a.is_crowd:
            faults.notice(draft.where, "a crowd (iscrowd 1), not learned from and not measured")


def _draft(
    number: int,
    annotation: object,
    entry: ImageEntry | None,
    categories: Mapping[SourceId, Category],
    faults: Faults,
    masks: Segmentations,
) -> _Draft:
    if not isinstance(annotation, dict):
        raise Unusable(f"annotation {number} (counted from 0)", f"is {short(annotation)}")
    own = source_id(annotation.get("id"))
    where = f"annotation {number} (counted from 0)" if own is None else f"annotation {own}"
    if entry is None:
        which = _written(annotation, "image_id")
        raise Unusable(where, f"is of image {which}, which is not in its list of images")
    where = f"{where} of image {entry.written_id}"
    category = known_category(annotation.get("category_id"), categories)
    if category is None:
        which = _written(annotation, "category_id")
        raise Unusable(where, f"has category_id {which}, which is not in its list of categories")
    try:
        crowd = is_crowd(annotation.get("iscrowd", annotation.get("is_crowd")))
        box = four_numbers(annotation.get("bbox"))
        mask = masks.read(annotation.get("segmentation"), box, entry.size_hw)
    except ValueError as error:
        raise Unusable(where, f"cannot be understood: {error}") from error
    if mask.in_parts:
        faults.repair(where, IN_PARTS)
        # Beside others in pixels, boxes in parts are of no one form.
        box = box if masks.all_in_parts or box is None or max(box) > 1 else None
    return _Draft(where, own, entry, category, crowd, mask, box, annotation)


def _written(annotation: Mapping[str, Any], key: str) -> str:
    """An id as it is written, for a message; what there is in its place, if there is none."""
    if key not in annotation:
        return f"None (it has {keys_of(annotation)})"
    return str(annotation[key]) if isinstance(annotation[key], str) else short(annotation[key])


def _finished(draft: _Draft, own: int, faults: Faults, form: BoxForm) -> Annotation:
    mask, size_hw = draft.mask, draft.entry.size_hw
    box = None if draft.box is None else form.to_xywh(draft.box, size_hw)
    if box is None or not _is_usable(box, size_hw):
        if mask.box_xyxy is not None:
            x0, y0, x1, y1 = mask.box_xyxy
            box = (x0, y0, x1 - x0, y1 - y0)
            faults.repair(draft.where, "bbox missing or not usable, taken from the mask")
        elif box is None or not mask or min(box[2:]) < 0:
            written = short(draft.raw.get("bbox"))
            raise Unusable(draft.where, f"has no usable bbox ({written}) and no pixel in its mask")
    else:
        _notice_box(box, draft, faults)
    if mask and mask.box_xyxy is None:
        faults.notice(draft.where, "no pixel in the mask, nothing to learn from")
    area = finite_number(draft.raw.get("area"))
    pixels = mask.num_pixels
    if area is None or area < 0 or (area == 0 and pixels):
        source = "mask" if mask else "box"
        area = float(pixels) if mask else box[2] * box[3]
        faults.repair(draft.where, f"area missing or not usable, taken from the {source}")
    elif pixels > _FEW_PIXELS and not pixels / 4 < area < 4 * max(pixels, box[2] * box[3]):
        faults.notice(draft.where, _OTHER_AREA)
    if not draft.is_crowd and draft.raw.get("ignore") in (1, "1"):
        faults.notice(draft.where, _IGNORED)
    ids = own, draft.entry.image_id, draft.category.category_id
    return Annotation(*ids, box, area, draft.is_crowd, mask.run_lengths)


def _notice_box(box: Box, draft: _Draft, faults: Faults) -> None:
    """Notice a box that is not that of its mask, or of nothing in its image."""
    mask, (height, width) = draft.mask, draft.entry.size_hw
    if mask.box_xyxy is not None and not draft.is_crowd and overlap(box, mask.box_xyxy) < 0.5:
        is_rle = isinstance(draft.raw.get("segmentation"), Mapping)
        in_rows = is_rle and mask.fits_in_rows(box, (height, width))
        faults.notice(draft.where, IN_ROWS if in_rows else _OTHER_BOX)
    elif not overlap(box, (0, 0, width, height)):
        faults.notice(draft.where, "bbox lies outside its image, kept as it is")
    elif mask.box_xyxy is None and min(box) >= 0 and max(box) <= 1 < min(height, width):
        faults.notice(draft.where, _FIRST_PIXEL)


def is_crowd(value: object) -> bool:
    """The meaning of an ``iscrowd`` field; ValueError if it has none.

    Examples:
        >>> [is_crowd(v) for v in (None, 0, "0", 0.0, "False", 1, True, "1")]
        [False, False, False, False, False, True, True, True]
    """
    text = str(value).strip().lower() if isinstance(value, (str, int, float, bool)) else value
    if text in (None, "", "0", "0.0", "false", "no", "none", "null", "nan"):
        return False
    if text in ("1", "1.0", "true", "yes"):
        return True
    raise ValueError(f"iscrowd {short(value)}; it is 0 or 1")


def _is_usable(box: Box, size_hw: Size) -> bool:
    x, y, w, h = box
    height, width = size_hw
    near = x >= -_FARTHEST * width and y >= -_FARTHEST * height
    near = near and x + w <= (1 + _FARTHEST) * width and y + h <= (1 + _FARTHEST) * height
    return w > 0 and h > 0 and near
