"""What the detector's boxes say about the orientation of annotations."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfdetr_pipelines.cache.relabel import run_relabel
from mfdetr_pipelines.config.cache import RelabelConfig
from PIL import Image, ImageOps

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.evaluation import cached_boxes
from mfdetr_cache.evaluation.cached_boxes import (
    cached_box_metrics,
    judge_orientations,
    judged_box_metrics,
    turned_boxes,
)
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.types import GroundTruth
from tests.support import scenes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_pillow_turns_their_image(orientation: int) -> None:
    size = (20, 20) if orientation >= 5 else (20, 30)
    boxes = np.array([[2, 3, 9, 5], [0, 11, 4, 20]], dtype=np.float32)
    wanted = []
    for x0, y0, x1, y1 in boxes.astype(int):
        pixels = np.zeros(size, np.uint8)
        pixels[y0:y1, x0:x1] = 255
        image = Image.fromarray(pixels)
        image.getexif()[0x0112] = orientation
        box = ImageOps.exif_transpose(image).getbbox()
        wanted.append(box)
    assert turned_boxes(boxes, size, orientation).tolist() == np.array(wanted).tolist()
    assert turned_boxes(boxes[:0], size, orientation).shape == (0, 4)


def results(image_id: int, truth: GroundTruth, boxes_xyxy: Any) -> list[dict[str, Any]]:
    boxes_xyxy = boxes_xyxy.tolist()
    return [
        {"image_id": image_id, "category_id": int(c), "score": 1.0, "bbox": xywh}
        for c, box in zip(truth.category_ids, boxes_xyxy, strict=True)
        for xywh in [[box[0], box[1], box[2] - box[0], box[3] - box[1]]]
    ]


@pytest.mark.parametrize(
    ("seen_as", "said"),
    [
        (1, ["is 100.0, and {} with annotations from before EXIF rotation: all is right"]),
        (3, ["warning: box AP of 8 of these images is {}, and 100.0 with annotations from before"]),
        (None, []),
    ],
)
def test_boxes_say_when_annotations_were_made(
    drawn_cache: Path, monkeypatch: pytest.MonkeyPatch, seen_as: int | None, said: list[str]
) -> None:
    """A detector that finds every object where it is annotated, where rotation puts it, or none."""
    cache = FeatureCache.open(drawn_cache)
    rows = {cache.image_id(row): row for row in cache.rows}

    def found(image_id: int, *_: object) -> list[dict[str, Any]]:
        if seen_as is None:
            return []
        row = rows[image_id]
        truth = cache.ground_truth(row)
        return results(
            image_id, truth, turned_boxes(truth.boxes_xyxy, cache.original_hw(row), seen_as)
        )

    monkeypatch.setattr(cached_boxes, "box_results", found)
    reporter = SilentReporter()
    judge_orientations(cache, dict.fromkeys(cache.rows, 3), reporter)
    judge_orientations(cache, {}, reporter)
    assert len(reporter.messages) == len(said)
    for message, text in zip(reporter.messages, said, strict=True):
        before, _, after = text.partition("{}")
        assert before in message
        assert after in message


@pytest.mark.parametrize("finds", [True, False])
def test_images_without_annotations_tell_nothing_of_a_detector(
    drawn_cache: Path,
    scenes_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finds: bool,
) -> None:
    whole = FeatureCache.open(drawn_cache)
    truth = {whole.image_id(row): whole.ground_truth(row) for row in whole.rows}
    path = tmp_path / "c.zarr"
    shutil.copytree(drawn_cache, path)
    document = scenes.load_annotations(scenes_folder)
    first = document["images"][0]["id"]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] == first]
    labels = tmp_path / "one.json"
    labels.write_text(json.dumps(document))
    run_relabel(RelabelConfig(str(path), labels), SilentReporter())

    cache, reporter = FeatureCache.open(path), SilentReporter()
    (only,) = (row for row in cache.rows if len(cache.ground_truth(row)))

    def found(image_id: int, *_: object) -> list[dict[str, Any]]:
        """The objects of every image, or nothing; most surely where nobody annotated them."""
        boxes = truth[image_id].boxes_xyxy
        score = 0.5 if image_id == cache.image_id(only) else 1.0
        listed = results(image_id, truth[image_id], boxes if finds else boxes / 9)
        return [{**r, "score": score} for r in listed]

    monkeypatch.setattr(cached_boxes, "box_results", found)
    box = judged_box_metrics(cache, reporter)
    assert f"{len(whole) - 1} of {len(whole)} images have no object" in reporter.messages[0]
    assert ["implausibly low" in m for m in reporter.messages[1:]] == [True] * (not finds)
    assert (cached_box_metrics(cache, [only]).AP, box.AP < 0.5) == (float(finds), True)
