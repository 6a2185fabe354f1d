"""COCO results files of any tool, checked against the annotation file they speak of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfdetr_cache.choices import OnBad
from mfdetr_cache.coco.annotations import CocoSplit
from mfdetr_cache.coco.box_forms import (
    Box,
    BoxForm,
    finite_number,
    form_of_boxes,
    four_numbers,
    overlap,
)
from mfdetr_cache.coco.categories import by_names_too, known_category
from mfdetr_cache.coco.faults import Faults, Unusable, keys_of, short
from mfdetr_cache.coco.ids import SourceId, images_by_name, known_image, named, source_id
from mfdetr_cache.coco.image_list import Category, ImageEntry
from mfdetr_cache.coco.json_file import read_json
from mfdetr_cache.coco.objects import IN_ROWS
from mfdetr_cache.coco.segmentation import IN_PARTS, Mask, Segmentations
from mfdetr_cache.errors import DatasetError
from mfdetr_cache.ops.masks import compress_run_lengths

# What other tools call a mask.
_OTHER_KEYS = {"mask", "masks", "rle", "segmentations", "polygon", "polygons"}


@dataclass(frozen=True, slots=True)
class ResultsFile:
    """The results of a file that can be used, and what was left out or repaired.

    They are as evaluators take them: ids of the split, ``bbox`` and ``segmentation`` where the
    result has them, masks as RLE dictionaries.
    """

    results: list[dict[str, Any]]
    faults: Faults

    def with_field(self, name: str) -> list[dict[str, Any]]:
        """The results that have ``bbox`` or ``segmentation``, in the order of the file."""
        return [r for r in self.results if name in r]


@dataclass(slots=True)
class _Draft:
    where: str
    entry: ImageEntry
    category_id: int
    score: float
    box: Box | None
    mask: Mask


def load_results(path: Path, split: CocoSplit, on_bad: OnBad = "stop") -> ResultsFile:
    """Read and check a COCO results file of the images of a split.

    It is a list of ``image_id``, ``category_id``, ``score``, and ``bbox`` (xywh) or
    ``segmentation``, in JSON, plain or compressed by gzip; a list without any is one. DatasetError
    if it is no list of results, or one cannot be used and ``on_bad`` does not leave it out.
    """
    document = read_json(path, "results file", "check --results").document
    if not isinstance(document, list):
        raise DatasetError(f"results file {path} holds no list of results{_instead(document)}")
    faults = Faults(str(path), "result", total=len(document))
    entries = [result for result in document if isinstance(result, dict)]
    reading = _Reading(
        images_by_name(
            {e.written_id: e for e in split.images},
            ((e.file_name, e) for e in split.images),
            {source_id(r.get("image_id")) for r in entries},
        ),
        by_names_too({c.written_id: c for c in split.categories}),
        Segmentations(r.get("segmentation") for r in entries),
        f" (it has {named(c.written_id for c in split.categories)}), so it matches nothing",
    )
    drafts: list[_Draft] = []
    for number, result in enumerate(document):
        with faults:
            if (draft := _draft(number, result, reading, faults)) is not None:
                drafts.append(draft)
    seen = ((d.box, d.mask.box_xyxy, d.entry.size_hw) for d in drafts)
    form = form_of_boxes(seen, str(path))
    results = []
    for draft in drafts:
        with faults:
            results.append(_finished(draft, faults, form))
    _notice_together(drafts, faults)
    _notice_other_keys(document, faults)
    faults.stop_if_unusable(on_bad)
    return ResultsFile(results, faults)


def _notice_together(drafts: Sequence[_Draft], faults: Faults) -> None:
    """Notice what no result tells alone: it is there twice, or all have one score."""
    seen: set[int] = set()
    alike = len(drafts) > 1 and len({d.score for d in drafts}) == 1
    for d in drafts:
        runs = d.mask.run_lengths.tobytes()
        same = hash((d.entry.image_id, d.category_id, d.score, d.box, runs))
        if same in seen:
            faults.notice(d.where, "score, box and mask are those of another, so one is wrong")
        seen.add(same)
        if alike:
            faults.notice(d.where, "score is that of all others, so their order decides the AP")


def _notice_other_keys(document: Sequence[object], faults: Faults) -> None:
    """Notice masks that stand where nobody looks for them."""
    for number, result in enumerate(document):
        if isinstance(result, dict) and not result.get("segmentation"):
            for key in sorted(_OTHER_KEYS & result.keys())[:1]:
                said = f"its mask is in {key!r}, not in 'segmentation', and not measured"
                faults.notice(f"result {number}", said)


def _instead(document: object) -> str:
    """What a file holds that is no list, behind a message."""
    if not isinstance(document, dict):
        return ""
    scored = document.get("annotations")
    if isinstance(scored, list) and scored and isinstance(scored[0], dict) and "score" in scored[0]:
        return ": its list 'annotations' has scores; write that list alone"
    if "images" in document:
        return ": it is an annotation file; are --results and --annotations swapped?"
    return f" but an object with {keys_of(document)}"


@dataclass(frozen=True, slots=True)
class _Reading:
    """What results are read by: images and categories by what names them, and their masks.

    ``known`` ends the message about an unknown category.
    """

    images: Mapping[SourceId, ImageEntry]
    categories: Mapping[SourceId, Category]
    masks: Segmentations
    known: str


def _draft(number: int, result: object, reading: _Reading, faults: Faults) -> _Draft | None:
    """A result; None of a category that is not annotated, which matches nothing."""
    where = f"result {number}"
    if not isinstance(result, dict):
        raise Unusable(where, f"is {short(result)}")
    image_id = source_id(result.get("image_id"))
    category_id = source_id(result.get("category_id"))
    score = finite_number(result.get("score"))
    if image_id is None or category_id is None or score is None:
        given = {"image_id": image_id, "category_id": category_id, "score": score}
        key = next(key for key, value in given.items() if value is None)
        kind = "number" if key == "score" else "id"
        said = f"it is {short(result[key])}" if key in result else f"it has {keys_of(result)}"
        raise Unusable(where, f"has no {kind} {key!r} ({said})")
    entry = known_image(image_id, reading.images)
    if entry is None:
        raise Unusable(where, f"is of image {image_id}, which is not in the annotation file")
    category = known_category(category_id, reading.categories)
    if category is None:
        faults.repair(where, f"category_id is not in the annotation file{reading.known}")
        return None
    box = four_numbers(result.get("bbox"))
    if box is None and result.get("bbox") not in (None, []):
        raise Unusable(where, f"has the bbox {short(result['bbox'])}; it is four numbers")
    try:
        mask = reading.masks.read(result.get("segmentation"), box, entry.size_hw)
    except ValueError as error:
        raise Unusable(where, f"has no usable segmentation: {error}") from error
    if box is None and not mask:
        raise Unusable(where, "has neither bbox nor segmentation")
    where = f"{where} of image {image_id}"
    if mask.in_parts:
        faults.repair(where, IN_PARTS)
    return _Draft(where, entry, category.category_id, score, box, mask)


def _finished(draft: _Draft, faults: Faults, form: BoxForm) -> dict[str, Any]:
    mask, size_hw = draft.mask, draft.entry.size_hw
    result: dict[str, Any] = {
        "image_id": draft.entry.image_id,
        "category_id": draft.category_id,
        "score": draft.score,
    }
    if draft.box is not None:
        box = form.to_xywh(draft.box, size_hw)
        if form.said:
            faults.repair(draft.where, form.said)
        if min(box[2:]) < 0:
            width, height = box[2:]
            raise Unusable(draft.where, f"has a bbox of width {width:g} and height {height:g}")
        result["bbox"] = list(box)
        other = mask.box_xyxy is not None and overlap(box, mask.box_xyxy) < 0.5
        if other and mask.fits_in_rows(box, size_hw):
            faults.notice(draft.where, IN_ROWS)
    if mask:
        result["segmentation"] = compress_run_lengths(mask.run_lengths, size_hw)
    return result
