import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.errors import DatasetError
from mfdetr_cache.ops.masks import decode_run_lengths
from mfdetr_cache.reporter import SilentReporter
from tests.support import scenes


@pytest.fixture
def document(scenes_folder: Path) -> dict[str, Any]:
    return scenes.load_annotations(scenes_folder)


def written(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(document))
    return path


def test_ground_truth_is_complete(scenes_folder: Path, document: dict[str, Any]) -> None:
    split = load_coco_split(scenes_folder / "instances.json")
    assert [e.image_id for e in split.images] == [i["id"] for i in document["images"]]
    truth = split.ground_truth(split.images[0], {3: 0, 7: 1})
    assert truth.labels.tolist() == [0, 1]
    assert truth.category_ids.tolist() == [3, 7]
    x, y, w, h = document["annotations"][0]["bbox"]
    assert truth.boxes_xyxy[0].tolist() == [x, y, x + w, y + h]
    assert np.isclose(
        truth.run_lengths[1][1::2].sum(), document["annotations"][1]["area"], rtol=0.1
    )


def test_categories_the_detector_lacks_have_label_minus_one(scenes_folder: Path) -> None:
    split = load_coco_split(scenes_folder / "instances.json")
    assert split.ground_truth(split.images[0], {7: 1}).labels.tolist() == [-1, 1]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="absent.json does not exist"):
        load_coco_split(tmp_path / "absent.json")


def test_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.json"
    path.write_text("hello")
    with pytest.raises(DatasetError, match="is not JSON"):
        load_coco_split(path)


def change(where: str, position: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    """Replace fields of an entry of a document; ``...`` removes one."""

    def apply(document: dict[str, Any]) -> None:
        entry = document[where][position]
        for key, value in fields.items():
            if value is ...:
                del entry[key]
            else:
                entry[key] = value

    return apply


def empty(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update({key: []})


def append(key: str, entry: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document[key].append(entry)


FAULTS = [
    (empty("annotations"), "empty list 'annotations'"),
    (empty("images"), "empty list 'images'"),
    (
        change("annotations", 2, category_id=99),
        "1002 of image 105 has category_id 99, which is not",
    ),
    (change("annotations", 2, category_id=None), "1002 of image 105 has category_id None, which"),
    (change("annotations", 2, image_id=99), "1002 is of image 99, which is not in its list of im"),
    (append("annotations", 7), r"annotation 16 \(counted from 0\) is 7"),
    (change("images", 1, id=100), "lists an image id twice: 100 is"),
    (change("images", 1, id=None), r"image 1 \(counted from 0\) lacks an 'id'"),
    (change("images", 1, height=2**40), "image 105 .* is an image of 1099511627776 x"),
    (change("images", 1, file_name="../../.ssh/id"), "which leaves the image folder"),
    (change("images", 1, file_name="a/..\\\\..\\\\b.png"), "which leaves the image folder"),
    (change("images", 1, file_name="/etc/passwd"), "file_name '/etc/passwd', which is absolute"),
    (change("images", 1, file_name="C:\\\\photos\\\\a.png"), "which is absolute"),
    (change("images", 1, file_name="a\0.png"), "which is no name of a file"),
    (change("images", 1, file_name="\u00e9" * 200), "which is too long for a file"),
    (change("images", 1, file_name="a/" * 5000), r"a/\.\.\.', which is too long for a file"),
    (change("images", 1, file_name="\udc00.png"), "which is no name of a file"),
    (change("categories", 1, id=3), "two categories of id 3: 'ellipse' and 'box'"),
    (change("categories", 1, id=None), "category 1 .* lacks an 'id'"),
    (lambda d: d.update(categories=[{}] * 20_001), "has 20001 categories, the limit is 20000"),
    (
        change("annotations", 2, iscrowd="maybe"),
        "1002 of image 105 .*iscrowd 'maybe'; it is 0 or 1",
    ),
    (change("annotations", 2, iscrowd=2), "iscrowd 2; it is 0 or 1"),
    (change("annotations", 2, segmentation=None), "annotation 1002 of image 105 has no mask"),
    (change("annotations", 2, segmentation=...), "annotation 1002 of image 105 has no mask"),
    (change("annotations", 2, segmentation=[[]]), "annotation 1002 of image 105 has no mask"),
    (change("annotations", 2, segmentation={"points": [[1, 2]]}), "is no RLE, which has size and"),
    (change("annotations", 2, segmentation=[[{"x": 1}]]), "no number: .{'x': 1}."),
    (change("images", 1, file_name=...), "image 105 lacks a 'file_name' .it has 'id', 'height'"),
    (lambda d: d.update(categories=["cat"]), "category 0 .* lacks an 'id'; it is 'cat'"),
    (lambda d: d.update(images={"1": 2}), "has no list 'images', but {'1': 2}; is it COCO"),
    (lambda d: d.pop("annotations"), "'annotations', .*Test images come without: nothing"),
    (change("annotations", 2, segmentation=5), "a segmentation is a list of polygons or an RLE"),
    (change("annotations", 2, segmentation=[[5, 5, 2e8, 5, 2e8, 2e8]]), "1002 .* reaches x = 2e"),
    (change("annotations", 2, segmentation=[[5, 5, 1e300, 5, 9, 9]]), "reaches x = 1e"),
    (change("annotations", 2, segmentation=[[5, 5, math.nan, 5, 9, 9]]), "is not finite"),
    (change("annotations", 2, segmentation=[[500, 5, 600, 5, 600, 9]]), "lie outside the image"),
    (change("annotations", 2, segmentation={"size": [5, 5], "counts": [25]}), "RLE of size"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS)
def test_faults_are_named(
    tmp_path: Path, scenes_folder: Path, document: dict[str, Any], spoil: Any, message: str
) -> None:
    spoil(document)
    with pytest.raises(DatasetError, match=message):
        load_coco_split(written(tmp_path, document), scenes_folder / "images")


def test_all_faults_are_named_at_once_and_can_be_left_out(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    for annotation in document["annotations"][3:]:
        annotation["segmentation"] = []
    path = written(tmp_path, document)
    with pytest.raises(DatasetError) as caught:
        load_coco_split(path)
    said = str(caught.value)
    assert "13 of 16 annotations cannot be used: annotation 1003 of image 105 has no" in said
    assert "annotation 1012 " in said
    assert "annotation 1013 " not in said
    assert said.endswith("; and 3 more; --on-bad-annotation skip leaves them out")
    split = load_coco_split(path, on_bad="skip")
    assert [len(split.annotations[e.image_id]) for e in split.images] == [2, 1, *[0] * 6]
    reporter = SilentReporter()
    split.tell_faults(reporter)
    assert "left out: 13 of 16 annotations cannot be used" in reporter.messages[0]
    kept = load_coco_split(path, needs="boxes")
    assert sum(len(a) for a in kept.annotations.values()) == 16
    assert len(kept.ground_truth(kept.images[-1], {}).run_lengths[0]) == 0


def test_an_image_that_cannot_be_used_is_left_out_with_its_annotations(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    document["images"][1]["width"] = 0
    path = written(tmp_path, document)
    split = load_coco_split(path, on_bad="skip")
    assert [e.image_id for e in split.images] == [i["id"] for i in document["images"] if i["width"]]
    assert split.faults[0].unusable == 1
    assert split.faults[1].unusable == 0


def test_a_limit_looks_at_nothing_else(tmp_path: Path, document: dict[str, Any]) -> None:
    document["annotations"][-1]["segmentation"] = None
    document["images"][-1]["height"] = None
    path = written(tmp_path, document)
    assert len(load_coco_split(path, limit=3).images) == 3


def test_sizes_and_names_come_from_the_files(tmp_path: Path, document: dict[str, Any]) -> None:
    """Backslashes, decomposed accents, sizes of -1; one file is rotated by EXIF."""
    images = tmp_path / "images"
    sizes = {}
    names = ["sub\\s\u00e9.png", "gro\u00df.png", "turned.jpg"]
    for number, (entry, name) in enumerate(zip(document["images"], names, strict=False)):
        on_disk = images / unicodedata.normalize("NFD", name.replace("\\", "/"))
        on_disk.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 2 else 1
        Image.new("RGB", (100 + number, 90)).save(on_disk, exif=exif)
        sizes[entry["id"]] = (102, 90) if number == 2 else (90, 100 + number)
        entry.update(file_name=name, height=-1, width=None)
    document["images"] = document["images"][:3]
    kept = [i["id"] for i in document["images"]]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
    for annotation in document["annotations"]:
        annotation["segmentation"] = [[5, 5, 30, 5, 30, 40]]
    path = written(tmp_path, document)
    split = load_coco_split(path, images)
    assert {e.image_id: e.size_hw for e in split.images} == sizes
    assert all((images / e.file_name).is_file() for e in split.images)
    reporter = SilentReporter()
    split.tell_faults(reporter)
    assert any("3 of 3 images: height and width missing" in m for m in reporter.messages)
    assert any("of 3 images: file_name is spelled otherwise" in m for m in reporter.messages)
    with pytest.raises(DatasetError, match="has height -1 and width None in place of its size"):
        load_coco_split(path)


@pytest.mark.parametrize(
    ("written_as", "on_disk"),
    [
        ("my%20photo%201.png", "my photo 1.png"),
        ("100%25.png", "100%25.png"),
        ("a.png", "a.PNG"),
        ("a.JPG", "a.jpg"),
        ("sub\\a%20b.JPG", "sub/a b.jpg"),
        ("a.png ", "a.png"),
        ("sub/IMG_1.PNG", "sub/img_1.png"),
        ("img_1.png", "IMG_1.JPG"),
        ("sub\\a.bmp", "sub/a.jpeg"),
        ("frame_0.25", "frame_0.25.jpg"),
        ("frame_0.25", "frame_0.25"),
        ("s3://bucket/a.png?X-Signature=a%2Fb", "a.png"),
        ("/data/local-files/?d=photos%2Fmy%20a.png", "my a.png"),
    ],
)
def test_names_are_found_as_tools_write_them(
    tmp_path: Path, document: dict[str, Any], written_as: str, on_disk: str
) -> None:
    images = tmp_path / "images"
    (images / on_disk).parent.mkdir(parents=True)
    (images / on_disk).write_bytes(b"")
    document["images"][0]["file_name"] = written_as
    split = load_coco_split(written(tmp_path, document), images)
    assert split.images[0].file_name == on_disk


def test_files_of_the_same_name_are_images_only_where_all_were_converted(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    """Masks lie beside photos, and other photos differ in their capitals."""
    images = tmp_path / "images"
    images.mkdir()
    names = ["a.jpg", "b.jpg", "C.png", "c.png", "d.bmp"]
    for image, name in zip(document["images"], names, strict=False):
        image["file_name"] = name
    for name in ("b.jpg", "a.png", "b.png", "c.png", "d.png"):
        (images / name).write_bytes(b"")
    split = load_coco_split(written(tmp_path, document), images)
    found = [e.file_name for e in split.images[:5]]
    assert found == ["a.jpg", "b.jpg", "C.png", "c.png", "d.png"]


def test_a_dot_within_a_name_begins_no_ending(tmp_path: Path, document: dict[str, Any]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "frame_0.jpg").write_bytes(b"")
    document["images"][0]["file_name"] = "frame_0.25"
    document["images"][1]["file_name"] = "\u00e9" * 127  # too long in its other form
    split = load_coco_split(written(tmp_path, document), images)
    assert [e.file_name for e in split.images[:2]] == ["frame_0.25", "\u00e9" * 127]


@pytest.mark.parametrize(
    "written_as",
    [
        "/home/me/photos/{}",
        "C:\\\\photos\\\\{}",
        "..\\\\..\\\\label-studio\\\\media\\\\upload\\\\4\\\\{}",
        "/data/local-files/?d=photos/{}",
        "images/1/{}",
        "https://storage/bucket/{}",
    ],
)
def test_paths_of_another_place_are_found_by_their_last_part(
    tmp_path: Path, scenes_folder: Path, document: dict[str, Any], written_as: str
) -> None:
    names = [i["file_name"] for i in document["images"]]
    for image in document["images"]:
        image["file_name"] = written_as.replace("\\\\", "\\").format(image["file_name"])
    split = load_coco_split(written(tmp_path, document), scenes_folder / "images")
    assert [e.file_name for e in split.images] == names
    (said,) = split.faults[0].repaired
    assert said == "file_name is a path of another place, found by its last part"
    document["images"][1]["file_name"] = f"/elsewhere/{names[0]}"  # which of both is it?
    with pytest.raises(DatasetError, match="absolute|leaves"):
        load_coco_split(written(tmp_path, document), scenes_folder / "images")


def test_results_need_no_image_of_an_absolute_path(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    for image in document["images"]:
        image["file_name"] = f"/home/me/{image['file_name']}"
    split = load_coco_split(written(tmp_path, document))
    assert [f"/home/me/{e.file_name}" for e in split.images] == [
        i["file_name"] for i in document["images"]
    ]


def test_no_spelling_of_a_name_leaves_the_folder(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    for name in ("%2e%2e/secret.png", "..%2fsecret.png", f"%2f{tmp_path}/secret.png"):
        document["images"][0]["file_name"] = name
        split = load_coco_split(written(tmp_path, document), tmp_path / "images")
        assert split.images[0].file_name == name  # a file that is not there


def test_lvis_names_its_images_by_url(tmp_path: Path, document: dict[str, Any]) -> None:
    names = []
    for image in document["images"]:
        names.append(image.pop("file_name"))
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{names[-1]}"
        image["neg_category_ids"] = [3]
    split = load_coco_split(written(tmp_path, document))
    assert [what[:29] for what in split.faults[0].noticed] == ["neg_category_ids, as in LVIS:"]
    assert [e.file_name for e in split.images] == names
    for evil in ("http://a/..", "x/%2e%2e%2fpasswd\0", ""):
        document["images"][0]["coco_url"] = evil
        with pytest.raises(DatasetError, match=r"image 100 .*file_name"):
            load_coco_split(written(tmp_path, document))


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
    reporter = SilentReporter()
    split.tell_faults(reporter)
    assert "8 of 16 annotations: bbox missing or not usable, taken from the mask" in "".join(
        reporter.messages
    )


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
    reporter = SilentReporter()
    split.tell_faults(reporter)
    assert "16 of 16 annotations: bbox is x0, y0, x1, y1 (COCO's is" in reporter.messages[0]


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
    reporter = SilentReporter()
    load_coco_split(written(tmp_path, document)).tell_faults(reporter)
    assert "16 of 16 annotations: bbox does not fit the mask" in reporter.messages[0]


def test_runs_along_rows_are_told(tmp_path: Path, document: dict[str, Any]) -> None:
    plain = load_coco_split(written(tmp_path, document))
    for entry in plain.images:
        own = [a for a in document["annotations"] if a["image_id"] == entry.image_id]
        for annotation, read in zip(own, plain.annotations[entry.image_id], strict=True):
            flat = decode_run_lengths(read.run_lengths, entry.size_hw).flatten()
            ends = np.flatnonzero(np.diff(flat, prepend=False))
            counts = np.diff(ends, prepend=0, append=flat.size).tolist()
            annotation["segmentation"] = {"size": list(entry.size_hw), "counts": counts}
    reporter = SilentReporter()
    load_coco_split(written(tmp_path, document)).tell_faults(reporter)
    assert "bbox fits the mask only if its runs went row by row" in reporter.messages[0]


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds a list, as results are; COCO instances are an object with the lists"),
        (5, "holds 5; COCO instances"),
        ([{"data": {}}], r"holds a list, as results are \(its first entry has 'data'\); COCO"),
        ({"items": [], "info": {}}, "has no list 'images', but 'items', 'info'; is it COCO"),
    ],
)
def test_files_of_other_kinds_are_told(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_coco_split(written(tmp_path, content))


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
    reporter = SilentReporter()
    load_coco_split(written(tmp_path, document)).tell_faults(reporter)
    area, ignore = reporter.messages
    assert "16 of 16 annotations: area is not that of mask or bbox" in area
    assert "1 of 16 annotations: marked 'ignore', which changes nothing" in ignore


def test_a_panoptic_file_is_told(tmp_path: Path, document: dict[str, Any]) -> None:
    document["annotations"] = [{"image_id": 100, "segments_info": [], "file_name": "a.png"}]
    with pytest.raises(DatasetError, match="is a panoptic one; pass COCO instances"):
        load_coco_split(written(tmp_path, document))


def test_a_file_that_is_listed_twice_is_worth_a_word(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    document["images"].append({**document["images"][0], "id": 7})
    reporter = SilentReporter()
    load_coco_split(written(tmp_path, document)).tell_faults(reporter)
    name = document["images"][0]["file_name"]
    (said,) = reporter.messages
    assert "1 of 9 images: file_name is that of another image too, so it counts twice" in said
    assert f"(image 7 ({name}))" in said


def test_null_names_are_no_names(tmp_path: Path, document: dict[str, Any]) -> None:
    document["categories"][1]["name"] = None
    names = [c.name for c in load_coco_split(written(tmp_path, document)).categories]
    assert names == ["ellipse", "category 7", "crowd"]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([-1, 0, 1, 3, 7, 100, 1000, 1e10, 1e300, -0.5, "1", "\ud800", "[1]", "b'0'"])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=8)
        | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner, max_size=3)
    ),
    max_leaves=12,
)
FIELDS = (
    [("images", key) for key in ("id", "file_name", "height", "width")]
    + [
        ("annotations", key)
        for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    ]
    + [("categories", key) for key in ("id", "name")]
)


@given(
    changes=st.lists(st.tuples(st.sampled_from(FIELDS), st.integers(0, 7), values), min_size=1),
    on_bad=st.sampled_from(["stop", "skip"]),
)
@settings(max_examples=200)
def test_whatever_stands_in_a_file_is_right_or_one_line(
    scenes_folder: Path, tmp_path_factory: pytest.TempPathFactory, changes: Any, on_bad: Any
) -> None:
    document = scenes.load_annotations(scenes_folder)
    for (key, field), position, value in changes:
        entries = document[key]
        entries[position % len(entries)][field] = value
    path = tmp_path_factory.getbasetemp() / "whatever.json"
    path.write_text(json.dumps(document))
    try:
        split = load_coco_split(path, on_bad=on_bad)
    except DatasetError:
        return
    for entry in split.images:
        truth = split.ground_truth(entry, {})
        assert np.isfinite(truth.boxes_xyxy).all()
        assert np.isfinite(truth.areas).all()
        assert all(int(r.sum()) == entry.size_hw[0] * entry.size_hw[1] for r in truth.run_lengths)
