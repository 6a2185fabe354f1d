"""``evaluate --results`` gives pycocotools' numbers, however ids, masks and boxes are written."""

import contextlib
import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mfdetr_pipelines.evaluate_results import run_evaluate_results
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mfdetr_cache.errors import DatasetError
from mfdetr_cache.reporter import SilentReporter
from tests.coco.test_annotations import values
from tests.support import scenes

Documents = tuple[dict[str, Any], list[dict[str, Any]]]


def detections(document: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Masks beside the annotated ones, wrong ones among them, with compressed RLE."""
    random = np.random.default_rng(seed)
    sizes = {i["id"]: (i["height"], i["width"]) for i in document["images"]}
    found = []
    for annotation in document["annotations"] * 2:
        h, w = sizes[annotation["image_id"]]
        rle = coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], h, w))
        shifted = np.roll(coco_mask.decode(rle), random.integers(-6, 7, 2), axis=(0, 1))
        moved = coco_mask.encode(np.asfortranarray(shifted))
        found.append(
            {
                "image_id": annotation["image_id"],
                "category_id": int(random.choice([annotation["category_id"], 3, 7])),
                "score": float(random.integers(1, 20)) / 20,
                "bbox": coco_mask.toBbox(moved).tolist(),
                "segmentation": {"size": [h, w], "counts": moved["counts"].decode()},
            }
        )
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    document = scenes.write_scenes(tmp_path_factory.mktemp("plain"), count=6, seed=5)
    document["annotations"][3]["iscrowd"] = 1
    return document, detections(document, seed=1)


def pycocotools_reads(folder: Path, documents: Documents) -> dict[str, list[float]]:
    """The numbers of pycocotools on files that it reads itself."""
    annotations, results = folder / "plain.json", folder / "plain-results.json"
    annotations.write_text(json.dumps(documents[0]))
    numbers = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        for kind, other in (("segm", "bbox"), ("bbox", "segmentation")):
            alone = [{k: v for k, v in r.items() if k != other} for r in documents[1]]
            results.write_text(json.dumps(alone))
            evaluation = COCOeval(truth, truth.loadRes(str(results)), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            numbers[kind] = evaluation.stats.tolist()
    return numbers


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, plain: Documents) -> dict[str, list[float]]:
    return pycocotools_reads(tmp_path_factory.mktemp("read"), plain)


def copied(documents: Documents) -> Documents:
    found: Documents = json.loads(json.dumps(documents))
    return found


def entries(documents: Documents) -> Iterator[dict[str, Any]]:
    yield from documents[0]["annotations"]
    yield from documents[1]


def renumber(new: Callable[[int], Any]) -> Callable[[Documents], None]:
    """Other ids of annotations; ``new`` gets their place."""

    def apply(documents: Documents) -> None:
        for place, annotation in enumerate(documents[0]["annotations"]):
            annotation["id"] = new(place)

    return apply


def rename(key: str, listed: str, new: Callable[[int], Any]) -> Callable[[Documents], None]:
    """Other ids of images or categories, the same everywhere, in the same order."""

    def apply(documents: Documents) -> None:
        for entry in documents[0][listed]:
            entry["id"] = new(entry["id"])
        for entry in entries(documents):
            entry[key] = new(entry[key])

    return apply


def rewrite(key: str, new: Callable[[Any], Any], *, results: bool) -> Callable[[Documents], None]:
    """Another way to write a field of all annotations, and of the results too."""

    def apply(documents: Documents) -> None:
        for entry in entries(documents) if results else documents[0]["annotations"]:
            entry[key] = new(entry[key])

    return apply


def drop(key: str) -> Callable[[Documents], None]:
    def apply(documents: Documents) -> None:
        for annotation in documents[0]["annotations"]:
            if not annotation[key]:
                del annotation[key]

    return apply


def files_for_ids(documents: Documents, those: Iterable[dict[str, Any]]) -> None:
    """Images named by their files, as tools do that have no ids."""
    names = {i["id"]: i["file_name"] for i in documents[0]["images"]}
    for number, entry in enumerate(those):
        name = names[entry["image_id"]]
        entry["image_id"] = name if number % 2 else name.removesuffix(".png")


def by_files_named_as_others(documents: Documents) -> None:
    """Annotations by files whose names are other images' ids."""
    ids = [i["id"] for i in documents[0]["images"]]
    for image, other in zip(documents[0]["images"], ids[1:] + ids, strict=False):
        image["file_name"] = f"photos/{other}.png"
    names = {i["id"]: i["file_name"] for i in documents[0]["images"]}
    for annotation in documents[0]["annotations"]:
        annotation["image_id"] = names[annotation["image_id"]].removeprefix("photos/")


def in_numbers(documents: Documents) -> None:
    """Results that name images by the number in their file's name, as ultralytics does."""
    for place, image in enumerate(documents[0]["images"]):
        image["file_name"] = f"photos/{place + 100:06d}.jpg"
    for result in documents[1]:
        result["image_id"] = 100 + (result["image_id"] - 100) // 5


def in_paths(documents: Documents) -> None:
    names = {i["id"]: i["file_name"] for i in documents[0]["images"]}
    for number, result in enumerate(documents[1]):
        path = f"/data/val/{names[result['image_id']]}"
        result["image_id"] = path if number % 2 else path.replace("/", "\\")


def by_converted_files(documents: Documents) -> None:
    """Numbered anew in every folder, and results of them as another format in another place."""
    for place, image in enumerate(documents[0]["images"]):
        image["file_name"] = f"camera{place % 2}/{place // 2:04d}.png"
    names = {i["id"]: i["file_name"] for i in documents[0]["images"]}
    for result in documents[1]:
        result["image_id"] = f"/data/{names[result['image_id']]}"
    for image in documents[0]["images"][:1]:
        image["file_name"] = image["file_name"].replace("0000.png", "first.tif")
    for result in documents[1]:
        result["image_id"] = result["image_id"].replace("camera0/0000.png", "x/First.JPG")


def in_capitals(documents: Documents) -> None:
    by_name(documents)
    for result in documents[1]:
        result["category_id"] = result["category_id"].upper()


def names_for_ids(documents: Documents, those: Iterable[dict[str, Any]]) -> None:
    names = {c["id"]: c["name"] for c in documents[0]["categories"]}
    for entry in those:
        entry["category_id"] = names[entry["category_id"]]


def by_name(documents: Documents) -> None:
    names_for_ids(documents, documents[1])


def padded(documents: Documents) -> None:
    for entry in documents[0]["images"] + documents[0]["categories"]:
        entry["id"] = f"{entry['id']:06d}"


def in_parts(documents: Documents, every: int = 1) -> None:
    """Polygons in parts of the sides of the image, of every so many annotations."""
    sizes = {i["id"]: (i["width"], i["height"]) for i in documents[0]["images"]}
    for annotation in documents[0]["annotations"][::every]:
        sides = sizes[annotation["image_id"]]
        annotation["segmentation"] = of_polygons(
            lambda s, sides=sides: [[v / sides[i % 2] for i, v in enumerate(p)] for p in s]
        )(annotation["segmentation"])


def in_parts_beside_nothing(documents: Documents) -> None:
    in_parts(documents)
    for annotation in documents[0]["annotations"]:
        annotation["segmentation"].insert(0, [])


def counts_list(segmentation: Any) -> Any:
    if isinstance(segmentation, list):
        return segmentation
    flat = coco_mask.decode(segmentation).flatten(order="F")
    ends = np.flatnonzero(np.diff(flat, prepend=0))
    return {**segmentation, "counts": np.diff(ends, prepend=0, append=flat.size).tolist()}


def pairs(segmentation: Any) -> Any:
    if isinstance(segmentation, dict):
        return segmentation
    return [np.reshape(p, (-1, 2)).tolist() for p in segmentation]


def of_polygons(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda s: change(s) if isinstance(s, list) else s


def of_rles(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda s: change(s) if isinstance(s, dict) else s


WAYS: dict[str, Callable[[Documents], None]] = {
    "as it is": lambda _: None,
    "annotation ids from 0": renumber(lambda i: i),
    "negative": renumber(lambda i: i - 7),
    "all the same": renumber(lambda _: 4),
    "repeated per image": renumber(lambda i: i % 2),
    "text": renumber(lambda i: f"c0ffee-{i}"),
    "null": renumber(lambda _: None),
    "above 2**63": renumber(lambda i: 2**70 + i),
    "floats": renumber(lambda i: i + 0.5),
    "image ids as text": rename("image_id", "images", str),
    "as floats": rename("image_id", "images", float),
    "negative image ids": rename("image_id", "images", lambda i: i - 1000),
    "image ids from 0": rename("image_id", "images", lambda i: (i - 100) // 5),
    "image ids that no double holds": rename("image_id", "images", lambda i: 2**62 + i),
    "image ids with zeros before them": rename("image_id", "images", lambda i: f"{i:06d}"),
    "zeros in the images alone": padded,
    "image names as ids": rename("image_id", "images", lambda i: f"f{i}"),
    "results by file name": lambda d: files_for_ids(d, d[1]),
    "annotations by file name": lambda d: files_for_ids(d, d[0]["annotations"]),
    "annotations by files named as other ids": by_files_named_as_others,
    "results by a number in the file's name": in_numbers,
    "results by a path": in_paths,
    "results by the category's name": by_name,
    "by its name in capitals": in_capitals,
    "all by the category's name": lambda d: names_for_ids(d, entries(d)),
    "results by files that were converted": by_converted_files,
    "category ids as text": rename("category_id", "categories", str),
    "category ids as floats": rename("category_id", "categories", float),
    "category ids as text of floats": rename("category_id", "categories", lambda i: f"{i}.0"),
    "category ids from 0": rename("category_id", "categories", lambda i: i - 3),
    "negative category ids": rename("category_id", "categories", lambda i: i - 12),
    "category names as ids": rename("category_id", "categories", lambda i: f"k{i:02d}"),
    "no iscrowd where it is 0": drop("iscrowd"),
    "iscrowd as text": rewrite("iscrowd", str, results=False),
    "iscrowd as truth": rewrite("iscrowd", bool, results=False),
    "iscrowd as float": rewrite("iscrowd", float, results=False),
    "iscrowd NaN": rewrite("iscrowd", lambda v: v or math.nan, results=False),
    "is_crowd": lambda d: [a.update(is_crowd=a.pop("iscrowd")) for a in d[0]["annotations"]],
    "iscrowd null": rewrite("iscrowd", lambda v: v or None, results=False),
    "boxes as text": rewrite("bbox", str, results=True),
    "corners": rewrite("bbox", lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]], results=True),
    "flat polygons": rewrite("segmentation", of_polygons(lambda s: s[0]), results=False),
    "points as dictionaries": rewrite(
        "segmentation",
        of_polygons(lambda s: [[{"x": x, "y": y} for x, y in p] for p in pairs(s)]),
        results=False,
    ),
    "bare points as dictionaries": rewrite(
        "segmentation",
        of_polygons(lambda s: [{"y": y, "x": x} for x, y in pairs(s)[0]]),
        results=False,
    ),
    "points": rewrite("segmentation", pairs, results=False),
    "bare points": rewrite("segmentation", of_polygons(lambda s: pairs(s)[0]), results=False),
    "empty polygons beside": rewrite(
        "segmentation", of_polygons(lambda s: [[], *s]), results=False
    ),
    "a list too many": rewrite("segmentation", of_polygons(lambda s: [s]), results=False),
    "two lists too many around points": rewrite(
        "segmentation", of_polygons(lambda s: [[pairs(s)]]), results=False
    ),
    "null beside polygons": rewrite(
        "segmentation", of_polygons(lambda s: [None, *s]), results=False
    ),
    "polygons in parts of the sides": in_parts,
    "polygons in parts of the sides beside others in pixels": lambda d: in_parts(d, every=3),
    "empty polygons beside parts of the sides": in_parts_beside_nothing,
    "polygons as text": rewrite("segmentation", of_polygons(json.dumps), results=False),
    "a polygon far outside beside": rewrite(
        "segmentation", of_polygons(lambda s: [*s, [400, 400, 500, 400, 500, 500]]), results=False
    ),
    "counts in a list": rewrite("segmentation", counts_list, results=True),
    "Python as text": rewrite("segmentation", str, results=True),
    "numpy's boxes as text": rewrite("bbox", lambda b: f"[{' '.join(map(str, b))}]", results=True),
    "counts on a line": rewrite(
        "segmentation", of_rles(lambda s: {**s, "counts": s["counts"] + "\n"}), results=True
    ),
    "RLE as text": rewrite("segmentation", of_rles(json.dumps), results=True),
    "counts alone": rewrite("segmentation", of_rles(lambda s: s["counts"]), results=True),
    "bytes as text": rewrite(
        "segmentation", of_rles(lambda s: {**s, "counts": str(s["counts"].encode())}), results=True
    ),
    "RLE in a list": rewrite("segmentation", of_rles(lambda s: [s]), results=True),
    "RLE without a size": rewrite(
        "segmentation", of_rles(lambda s: {"counts": s["counts"]}), results=True
    ),
    "sizes as floats": rewrite(
        "segmentation",
        of_rles(lambda s: {**s, "size": [float(v) for v in s["size"]]}),
        results=True,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_gives_the_numbers_of_pycocotools(
    tmp_path: Path, plain: Documents, wanted: dict[str, list[float]], way: str
) -> None:
    assert 0.05 < wanted["segm"][0] < 0.9
    written = copied(plain)
    WAYS[way](written)
    paths = tmp_path / "results.json", tmp_path / "annotations.json"
    paths[0].write_text(json.dumps(written[1]))
    paths[1].write_text(json.dumps(written[0]))
    for evaluator in ("fast", "pycocotools"):
        found = run_evaluate_results(*paths, evaluator, extras=())  # type: ignore[arg-type]
        for kind, numbers in wanted.items():
            report = found.reports[kind]  # type: ignore[index]
            ours = [*report.metrics.to_dict().values(), *report.recall.values()]
            assert ours == pytest.approx(numbers, abs=1e-9), (evaluator, kind)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gzip"])
def test_every_encoding_is_read(
    tmp_path: Path, plain: Documents, wanted: dict[str, list[float]], encoding: str
) -> None:
    paths = tmp_path / "results.json", tmp_path / "annotations.json"
    for path, document in zip(paths, (plain[1], plain[0]), strict=True):
        text = json.dumps(document)
        data = gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding)
        path.write_bytes(data)
    found = run_evaluate_results(*paths, extras=())
    assert pytest.approx(wanted["segm"][0], abs=1e-9) == found.reports["segm"].metrics.AP


def measured(
    tmp_path: Path, documents: Documents, **options: Any
) -> tuple[dict[str, Any], list[str]]:
    paths = tmp_path / "results.json", tmp_path / "annotations.json"
    paths[0].write_text(json.dumps(documents[1]))
    paths[1].write_text(json.dumps(documents[0]))
    reporter = SilentReporter()
    found = run_evaluate_results(*paths, reporter=reporter, **options)
    return found.metrics(), reporter.messages


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("score", None, "result 3 has no number 'score'"),
        ("score", float("nan"), "result 3 has no number 'score'"),
        ("image_id", 12345, "result 3 is of image 12345, which is not in the annotation file"),
        ("image_id", None, "result 3 has no id 'image_id'"),
        ("category_id", [], "result 3 has no id 'category_id'"),
        ("bbox", [1, 2, 3], r"result 3 has the bbox \[1, 2, 3\]; it is four numbers"),
        ("bbox", [1, 2, 3, float("inf")], "result 3 has the bbox"),
        ("bbox", [1, 2, -3, 4], "result 3 of image .* has a bbox of width -3 and height 4"),
        ("segmentation", {"size": [1, 2], "counts": "1"}, "result 3 .* RLE of size"),
        ("segmentation", [[1, 1, 1e9, 1, 1e9, 1e9]], "result 3 .* reaches x = 1e"),
        ("segmentation", {"size": [2**31, 2**31], "counts": "0"}, "result 3 .* RLE of size"),
    ],
)
def test_a_result_that_cannot_be_used_is_named_or_left_out(
    tmp_path: Path, plain: Documents, key: str, value: Any, message: str
) -> None:
    written = copied(plain)
    written[1][3][key] = value
    with pytest.raises(DatasetError, match=message):
        measured(tmp_path, written)
    found, messages = measured(tmp_path, written, on_bad="skip", extras=())
    assert "left out: 1 of 24 results cannot be used: result 3" in messages[0]
    without = copied(plain)
    del without[1][3]
    assert found == measured(tmp_path, without, extras=())[0]


def test_a_swapped_size_is_told(tmp_path: Path, plain: Documents) -> None:
    written = copied(plain)
    for result in written[1]:
        result["segmentation"]["size"].reverse()
    with pytest.raises(DatasetError, match=r"its size is \[width, height\], COCO's is"):
        measured(tmp_path, written)


def test_images_whose_masks_nobody_drew_are_left_out(tmp_path: Path, plain: Documents) -> None:
    """Mask AP is that of a file without them, and without any other object that has no mask."""
    truth, results = copied(plain)
    first, second = (i["id"] for i in truth["images"][:2])
    boxes_only = [a for a in truth["annotations"] if a["image_id"] == first]
    boxes_only.append(next(a for a in truth["annotations"] if a["image_id"] == second))
    for annotation in boxes_only:
        annotation["segmentation"] = None
    found, messages = measured(tmp_path, (truth, results))
    assert found["box"] == measured(tmp_path, plain)[0]["box"]
    number = f"{len(boxes_only)} of {len(truth['annotations'])} objects have no mask"
    assert any(
        number in m
        and f"1 of {len(truth['images'])} images have boxes only" in m
        and "found of 1 of the objects" in m
        for m in messages
    )
    drawn = {
        **truth,
        "images": [i for i in truth["images"] if i["id"] != first],
        "annotations": [a for a in truth["annotations"] if a["segmentation"]],
    }
    cleaned = (drawn, [r for r in results if r["image_id"] != first])
    expected, _ = measured(tmp_path, cleaned)
    assert len(cleaned[1]) < len(results)
    assert (found["mask"], found["boundary"]) == (expected["mask"], expected["boundary"])


def test_many_images_without_an_object_are_told(tmp_path: Path, plain: Documents) -> None:
    truth, results = copied(plain)
    images = [i["id"] for i in truth["images"]]
    some = len(images) // 3 + 1
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in images[some:]]
    _, messages = measured(tmp_path, (truth, results))
    assert any(f"{some} of {len(images)} images have no object" in m for m in messages)
    assert not any("have no object" in m for m in measured(tmp_path, plain)[1])


def test_many_images_without_a_result_are_told(tmp_path: Path, plain: Documents) -> None:
    truth, results = copied(plain)
    images = [i["id"] for i in truth["images"]]
    some = [r for r in results if r["image_id"] in images[:3]]
    found, messages = measured(tmp_path, (truth, some))
    assert found["mask"]["AP"] == pytest.approx(
        pycocotools_reads(tmp_path, (truth, some))["segm"][0]
    )
    assert any("3 of 6 images with objects have no result, so all their obj" in m for m in messages)
    assert not any("have no result" in m for m in measured(tmp_path, (truth, results[4:]))[1])
    assert not any("have no result" in m for m in measured(tmp_path, (truth, []))[1])


def test_results_whose_runs_go_along_rows_are_told(tmp_path: Path, plain: Documents) -> None:
    written = copied(plain)
    for result in written[1]:
        flat = coco_mask.decode(result["segmentation"]).flatten()
        ends = np.flatnonzero(np.diff(flat, prepend=0))
        counts = np.diff(ends, prepend=0, append=flat.size).tolist()
        result["segmentation"]["counts"] = counts
    _, messages = measured(tmp_path, written)
    assert any("bbox fits the mask only if its runs went row by row" in m for m in messages)


def test_what_cannot_be_measured_is_said(tmp_path: Path, plain: Documents) -> None:
    whole, _ = measured(tmp_path, plain)
    boxes = copied(plain)
    for annotation in boxes[0]["annotations"]:
        del annotation["segmentation"]
    found, messages = measured(tmp_path, boxes)
    assert (found["mask"], found["boundary"], found["box"]) == (None, None, whole["box"])
    assert any("the annotations have no masks: only boxes are measured" in m for m in messages)
    some = copied(plain)
    for result in some[1][::2]:
        del result["segmentation"]
    found, messages = measured(tmp_path, some)
    assert found["mask"]["AP"] < whole["mask"]["AP"]
    assert any("12 of 24 results have no segmentation; mask AP is that of" in m for m in messages)
    unknown = copied(plain)
    unknown[1].append({**unknown[1][0], "category_id": 99})
    found, messages = measured(tmp_path, unknown)
    assert found == whole
    assert any("category_id is not in the annotation file" in m for m in messages)
    with pytest.raises(DatasetError, match="holds no list of results"):
        measured(tmp_path, (plain[0], {"annotations": []}))  # type: ignore[arg-type]


def test_results_of_other_categories_or_places_are_told(tmp_path: Path, plain: Documents) -> None:
    other = copied(plain)
    for result, annotation in zip(other[1], other[0]["annotations"] * 2, strict=True):
        result["category_id"] = {3: 7, 7: 3}[annotation["category_id"]]
    found, messages = measured(tmp_path, other, extras=())
    assert found["mask"]["AP"] < 0.1
    alike = copied(plain)
    for entry in entries(alike):
        entry["category_id"] = 3
    whole = pycocotools_reads(tmp_path, alike)["segm"][0]
    assert f"but {100 * whole:.1f} where categories do not count" in messages[0]
    moved = copied(plain)
    for result in moved[1]:
        del result["segmentation"]
        result["bbox"] = [3 * v for v in result["bbox"]]
    found, messages = measured(tmp_path, moved)
    assert any("box AP is 0.0, and no better where categories do not count" in m for m in messages)


def test_a_number_in_a_files_name_is_no_id(tmp_path: Path, plain: Documents) -> None:
    written = copied(plain)
    for image in written[0]["images"]:
        image["file_name"] = f"photo-{image['id']}.png"
    written[1][3]["image_id"] = f"/data/{written[1][3]['image_id']}.jpg"
    with pytest.raises(DatasetError, match=r"result 3 is of image /data/\d+\.jpg, which is not in"):
        measured(tmp_path, written)


def test_masks_under_another_key_are_told(tmp_path: Path, plain: Documents) -> None:
    written = copied(plain)
    for result in written[1]:
        result["rle"] = result.pop("segmentation")
    found, messages = measured(tmp_path, written)
    assert found["mask"] is None
    assert any(
        "24 of 24 results: its mask is in 'rle', not in 'segmentation'" in m for m in messages
    )


def test_one_score_for_all_is_told(tmp_path: Path, plain: Documents) -> None:
    written = copied(plain)
    for result in written[1]:
        result["score"] = 1.0
    found, messages = measured(tmp_path, written, extras=())
    assert found["mask"]["AP"] == pytest.approx(pycocotools_reads(tmp_path, written)["segm"][0])
    assert any("24 of 24 results: score is that of all others" in m for m in messages)


def test_results_that_are_there_twice_are_told(tmp_path: Path, plain: Documents) -> None:
    _, messages = measured(tmp_path, (plain[0], plain[1] * 2), extras=())
    assert any("24 of 48 results: score, box and mask are those of another" in m for m in messages)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"images": []}, "no list of results: it is an annotation file; are --results and"),
        ({"images": [], "annotations": [{"score": 1}]}, "'annotations' has scores; write that li"),
        ({"predictions": []}, "no list of results but an object with 'predictions'"),
        ([{"image_id": 100, "category_id": 3, "confidence": 1}], "no number 'score' .it has 'imag"),
    ],
)
def test_files_of_other_kinds_are_told(
    tmp_path: Path, plain: Documents, results: Any, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        measured(tmp_path, (plain[0], results))


def test_nothing_found_is_zero_and_nothing_to_find_is_minus_one(
    tmp_path: Path, plain: Documents
) -> None:
    found, _ = measured(tmp_path, (plain[0], []))
    areas = [a["area"] for a in plain[0]["annotations"] if not a["iscrowd"]]
    assert max(areas) < 96**2
    assert found["mask"] == found["box"]
    assert found["mask"] == {"AP": 0, "AP50": 0, "AP75": 0, "APS": 0, "APM": 0, "APL": -1}
    crowds = copied(plain)
    for annotation in crowds[0]["annotations"]:
        annotation["iscrowd"] = 1
    for results in ([], crowds[1]):
        found, messages = measured(tmp_path, (crowds[0], results))
        assert set(found["mask"].values()) == {-1}
        assert len(messages) == 1
        assert "12 of 12 annotations: a crowd (iscrowd 1)" in messages[0]


@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(["image_id", "category_id", "score", "bbox", "segmentation"]),
            st.integers(0, 23),
            values,
        ),
        min_size=1,
    )
)
@settings(max_examples=50)
def test_whatever_stands_in_results_is_right_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, plain: Documents, changes: Any
) -> None:
    written = copied(plain)
    for key, place, value in changes:
        written[1][place][key] = value
    with contextlib.suppress(DatasetError):
        measured(tmp_path_factory.getbasetemp(), written, extras=(), on_bad="skip")
