"""Boxes, masks and areas of objects, as tools write them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.errors import DatasetError
from mfdetr_cache.ops.masks import decode_run_lengths
from tests.support.scenes import told, written


def test_boxes_are_taken_from_masks_and_areas_too(tmp_path: Path, document: dict[str, Any]) -> None:
    wanted = load_coco_split(written(tmp_path, document))
    odd = [None, [], [1, 2, 3], ["a", 1, 2, 3], [math.nan] * 4, [5, 5, 0, 9], [5, 5, -3, 9], {}]
    areas = [None, -1, math.inf, "x", 0, [], math.nan, {}]
    for annotation, box, area in zip(document["annotations"], odd, areas, strict=False):
        annotation.update(bbox=box, area=area)
    split = load_coco_split(written(tmp_path, document))
    pairs = [
        (ours, theirs)
        for e in split.images
        for ours, theirs in zip(
            split.annotations[e.image_id], wanted.annotations[e.image_id], strict=True
        )
    ]
    assert len(pairs) == 16
    for ours, theirs in pairs:
        mask = decode_run_lengths(
            ours.run_lengths, next(e.size_hw for e in split.images if e.image_id == ours.image_id)
        )
        assert np.abs(np.subtract(ours.box_xywh, theirs.box_xywh)).max() <= 1
        if ours.box_xywh != theirs.box_xywh:
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            x, y = columns[0], rows[0]
            assert ours.box_xywh == (x, y, columns[-1] + 1 - x, rows[-1] + 1 - y)
    assert [p[0].area for p in pairs[:8]] == [p[0].run_lengths[1::2].sum() for p in pairs[:8]]
    assert [p[0].area for p in pairs[8:]] == [p[1].area for p in pairs[8:]]
    said = "".join(told(split))
    assert "8 of 16 annotations: bbox missing or not usable, taken from the mask" in said


@pytest.mark.parametrize("masks", [True, False])
def test_boxes_written_as_corners_are_read_as_corners(
    tmp_path: Path, document: dict[str, Any], masks: bool
) -> None:
    if not masks:
        for annotation in document["annotations"]:
            del annotation["segmentation"]
    plain = load_coco_split(written(tmp_path, document), needs="boxes")
    assert not any(f.repaired for f in plain.faults)
    for annotation in document["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
    split = load_coco_split(written(tmp_path, document), needs="boxes")
    for entry in split.images:
        ours, theirs = (s.ground_truth(entry, {}).boxes_xyxy for s in (split, plain))
        np.testing.assert_array_equal(ours, theirs)
    assert "16 of 16 annotations: bbox is x0, y0, x1, y1 (COCO's is" in told(split)[0]


@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize("kind", ["size", "corners", "rows", "centre"])
def test_boxes_in_other_forms_are_read_as_their_masks_say(
    tmp_path: Path, document: dict[str, Any], kind: str, in_parts: bool
) -> None:
    plain = load_coco_split(written(tmp_path, document))
    sides = {i["id"]: (i["width"], i["height"]) for i in document["images"]}
    for annotation in document["annotations"]:
        x, y, w, h = annotation["bbox"]
        forms = {
            "size": (x, y, w, h),
            "corners": (x, y, x + w, y + h),
            "rows": (y, x, y + h, x + w),
            "centre": (x + w / 2, y + h / 2, w, h),
        }
        width, height = sides[annotation["image_id"]] if in_parts else (1, 1)
        along = (height, width) if kind == "rows" else (width, height)
        pairs = zip(forms[kind], along * 2, strict=True)
        annotation["bbox"] = [value / side for value, side in pairs]
    split = load_coco_split(written(tmp_path, document))
    for entry in split.images:
        ours, theirs = (s.ground_truth(entry, {}).boxes_xyxy for s in (split, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    said = [what for f in split.faults for what in f.repaired]
    assert bool(said) == (in_parts or kind != "size")
    assert all(("in parts of the image's sides" in what) == in_parts for what in said)
    for annotation in document["annotations"]:
        del annotation["segmentation"]
    if in_parts:
        with pytest.raises(DatasetError, match="every bbox lies between 0 and 1"):
            load_coco_split(written(tmp_path, document), needs="boxes")


def test_boxes_beside_their_masks_are_worth_a_word(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    for annotation in document["annotations"]:
        annotation["bbox"] = [v / 7 for v in annotation["bbox"]]
    assert (
        "16 of 16 annotations: bbox does not fit the mask"
        in told(load_coco_split(written(tmp_path, document)))[0]
    )


def test_boxes_as_polygons_are_worth_a_word(tmp_path: Path, document: dict[str, Any]) -> None:
    for annotation in document["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    (said,) = told(load_coco_split(written(tmp_path, document)))
    assert "16 of 16 annotations: the mask is a whole rectangle, as where boxes were" in said


def test_runs_along_rows_are_told(tmp_path: Path, document: dict[str, Any]) -> None:
    plain = load_coco_split(written(tmp_path, document))
    for entry in plain.images:
        own = [a for a in document["annotations"] if a["image_id"] == entry.image_id]
        for annotation, read in zip(own, plain.annotations[entry.image_id], strict=True):
            flat = decode_run_lengths(read.run_lengths, entry.size_hw).flatten()
            ends = np.flatnonzero(np.diff(flat, prepend=False))
            counts = np.diff(ends, prepend=0, append=flat.size).tolist()
            annotation["segmentation"] = {"size": list(entry.size_hw), "counts": counts}
    assert (
        "bbox fits the mask only if its runs went row by row"
        in told(load_coco_split(written(tmp_path, document)))[0]
    )


def test_boxes_as_large_as_their_images_are_no_corners(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    """Without masks they would be taken for such."""
    sides = {i["id"]: [i["width"], i["height"]] for i in document["images"]}
    for annotation in document["annotations"]:
        annotation["bbox"][2:] = sides[annotation["image_id"]]
    (_, faults) = load_coco_split(written(tmp_path, document)).faults
    assert not faults.repaired


def test_boxes_that_fit_no_form_stay_as_they_are(tmp_path: Path, document: dict[str, Any]) -> None:
    for annotation in document["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, x + w, y, y + h]
    (_, faults) = load_coco_split(written(tmp_path, document)).faults
    assert not any("read so" in what for what in faults.repaired)


def test_what_no_annotation_tells_alone_is_worth_a_word(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    first = document["annotations"][0]
    document["annotations"].append({**first, "id": 5})
    document["annotations"].append({**first, "id": 6, "segmentation": [], "bbox": [999, 9, 5, 5]})
    (_, faults) = load_coco_split(written(tmp_path, document), needs="boxes").faults
    assert dict(faults.noticed) == {
        "box and mask are those of another, so it counts twice": 1,
        "bbox lies outside its image, kept as it is": 1,
    }
    for number, annotation in enumerate(document["annotations"]):
        annotation["iscrowd"] = int(number < 4)
    (_, faults) = load_coco_split(written(tmp_path, document), needs="boxes").faults
    assert faults.noticed["a crowd (iscrowd 1), not learned from and not measured"] == 4


def test_one_polygon_in_pixels_tells_that_all_are(tmp_path: Path, document: dict[str, Any]) -> None:
    kept = [e["segmentation"] for e in document["annotations"]]
    document["annotations"][1]["segmentation"] = [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]
    split = load_coco_split(written(tmp_path, document))
    assert not split.faults[1].repaired
    assert isinstance(kept[0], list)
    assert split.annotations[100][1].run_lengths[1::2].sum() <= 1


@pytest.mark.parametrize("boxes", ["pixels", "parts", "none"])
def test_some_in_parts_and_some_in_pixels(
    tmp_path: Path, document: dict[str, Any], boxes: str
) -> None:
    """As where two exports were put into one file, one of them drawn beyond the image."""
    plain = load_coco_split(written(tmp_path, document))
    sides = {i["id"]: (i["width"], i["height"]) for i in document["images"]}
    for annotation in document["annotations"][::2]:
        own = sides[annotation["image_id"]]
        scaled = [[v / own[i % 2] for i, v in enumerate(p)] for p in annotation["segmentation"]]
        annotation["segmentation"] = scaled
        if boxes != "pixels":
            box = [v / own[i % 2] for i, v in enumerate(annotation["bbox"])]
            annotation["bbox"] = box if boxes == "parts" else None
    split = load_coco_split(written(tmp_path, document))
    for entry in split.images:
        ours, theirs = (s.ground_truth(entry, {}) for s in (split, plain))
        np.testing.assert_array_equal(ours.run_lengths[0], theirs.run_lengths[0])
        np.testing.assert_allclose(ours.boxes_xyxy, theirs.boxes_xyxy, atol=1)
    assert [n for what, n in split.faults[1].repaired.items() if "read so" in what] == [8]


def test_polygons_a_little_beyond_the_image_are_in_parts_too(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    for annotation in document["annotations"]:
        annotation["segmentation"] = [[-0.01, 0.1, 0.9, 0.1, 0.9, 1.004]]
    split = load_coco_split(written(tmp_path, document))
    assert split.annotations[100][0].run_lengths[1::2].sum() > 1000


def test_boxes_in_the_first_pixel_are_worth_a_word(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    for annotation in document["annotations"]:
        del annotation["segmentation"]
    document["annotations"][1]["bbox"] = [0.2, 0.2, 0.5, 0.5]
    (_, faults) = load_coco_split(written(tmp_path, document), needs="boxes").faults
    assert [what[:29] for what in faults.noticed] == ["bbox lies in the first pixel,"]


def test_whole_numbers_are_no_parts_of_sides(tmp_path: Path, document: dict[str, Any]) -> None:
    """A polygon around one pixel, or of nothing, says nothing of others in the file."""
    for annotation in document["annotations"]:
        annotation["segmentation"] = {"counts": [70, 30]}
    for image in document["images"]:
        image["height"] = image["width"] = 10
    document["annotations"][0]["segmentation"] = [[0, 0, 1, 0, 1, 1, 0, 1]]
    split = load_coco_split(written(tmp_path, document))
    assert split.annotations[100][0].run_lengths[1::2].sum() == 1
    assert not any("parts" in what for faults in split.faults for what in faults.repaired)


def test_fields_that_mean_something_else_are_worth_a_word(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    for annotation in document["annotations"]:
        annotation["area"] /= 5000
    document["annotations"][1]["ignore"] = 1
    area, ignore = told(load_coco_split(written(tmp_path, document)))
    assert "16 of 16 annotations: area is not that of mask or bbox" in area
    assert "1 of 16 annotations: marked 'ignore', which changes nothing" in ignore
