"""``evaluate --results`` gives pycocotools' numbers, however ids, masks and boxes are written."""

import contextlib
import gzip
import io
import json
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
from tests.support.written_results import (
    WAYS,
    Documents,
    copied,
    detections,
    entries,
)


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
