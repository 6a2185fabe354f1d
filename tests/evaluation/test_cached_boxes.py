"""What the detector's boxes say about the orientation of annotations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.evaluation import cached_boxes
from mfdetr_cache.evaluation.cached_boxes import judge_orientations, turned_boxes
from mfdetr_cache.reporter import SilentReporter


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
        boxes = turned_boxes(truth.boxes_xyxy, cache.original_hw(row), seen_as)
        return [
            {"image_id": image_id, "category_id": int(c), "score": 1.0, "bbox": xywh}
            for c, box in zip(truth.category_ids, boxes.tolist(), strict=True)
            for xywh in [[box[0], box[1], box[2] - box[0], box[3] - box[1]]]
        ]

    monkeypatch.setattr(cached_boxes, "box_results", found)
    reporter = SilentReporter()
    judge_orientations(cache, dict.fromkeys(cache.rows, 3), reporter)
    judge_orientations(cache, {}, reporter)
    assert len(reporter.messages) == len(said)
    for message, text in zip(reporter.messages, said, strict=True):
        before, _, after = text.partition("{}")
        assert before in message
        assert after in message
