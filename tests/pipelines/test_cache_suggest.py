"""Which images to draw masks for next: those a head is unsure of, over all categories."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfdetr_pipelines.cache.relabel import run_relabel
from mfdetr_pipelines.cache.suggest import SuggestSummary, most_worthwhile, run_suggest
from mfdetr_pipelines.config.cache import RelabelConfig, SuggestConfig
from mfdetr_pipelines.extract import run_extract
from PIL import Image

from mfdetr_cache.coco.synthetic import SHAPES, draw_scene
from mfdetr_cache.demo import demo_detector, demo_head
from mfdetr_cache.errors import ConfigError, DatasetError
from mfdetr_cache.reporter import SilentReporter
from tests.support import scenes

NOISY = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scenes that are annotated with boxes; one is covered in noise."""
    folder = tmp_path_factory.mktemp("unsure")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(SHAPES, 1)],
    }
    for number in range(4):
        picture, objects = draw_scene(900_001 + 2 * number)
        pixels = np.asarray(picture, np.float64)
        if number == NOISY:
            pixels = pixels + random.normal(0, 40, pixels.shape)
        name = f"{number}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
        size = {"height": picture.height, "width": picture.width}
        document["images"].append({"id": number + 1, "file_name": name, **size})
        for found in objects:
            annotation = {"image_id": number + 1, "category_id": found["label"] + 1}
            document["annotations"].append(
                {**annotation, "bbox": [float(v) for v in found["box_xywh"]]}
            )
    scenes.save_annotations(folder, document)
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path) -> Path:
    path = folder / "c.zarr"
    run_extract(scenes.extract_config(folder, str(demo_detector()), path), SilentReporter())
    return path


def suggested(cache: Path, reporter: Any = None, **changes: Any) -> SuggestSummary:
    config = SuggestConfig(str(cache), demo_head(), device="cpu", **changes)
    return run_suggest(config, reporter or SilentReporter())


def test_the_image_the_head_is_unsure_of_comes_first_until_it_is_drawn(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    boxes_only = Path(f"{cache}@0")
    found = suggested(boxes_only)
    names = [i.file_name for i in found.images]
    assert names[0] == f"{NOISY}.png"
    assert sorted(names) == ["0.png", "1.png", "2.png", "3.png"]
    assert found.images[0].uncertainty > 2 * max(i.uncertainty for i in found.images[1:])
    assert set(found.images[0].objects) <= set(SHAPES)
    assert (found.looked_at, found.without_objects, found.drawn) == (4, 0, 0)
    # Its masks are drawn; the others still have boxes only, or nothing.
    document = scenes.load_annotations(folder)
    drawn = [a for a in document["annotations"] if a["image_id"] != 2]
    for annotation in drawn:
        x, y, w, h = annotation["bbox"]
        if annotation["image_id"] == NOISY + 1:
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    better = tmp_path / "better.json"
    better.write_text(json.dumps({**document, "annotations": drawn}))
    run_relabel(RelabelConfig(str(cache), better), SilentReporter())
    after = suggested(cache, count=2)
    assert len(after.images) == 2
    assert (after.looked_at, after.drawn) == (3, 1)
    assert f"{NOISY}.png" not in [i.file_name for i in after.images]
    assert suggested(boxes_only) == found
    with pytest.raises(DatasetError, match="none of the 3 images .*; lower --threshold"):
        suggested(cache, threshold=1.0)


def test_where_every_mask_is_drawn_all_images_are_ranked(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    class Told(SilentReporter):
        def warn(self, message: str) -> None:
            told.append(message)

    told: list[str] = []
    document = scenes.load_annotations(folder)
    for annotation in document["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(document))
    run_relabel(RelabelConfig(str(cache), whole), SilentReporter())
    assert suggested(cache, Told()).images[0].file_name == f"{NOISY}.png"
    assert "every image of" in told[0]


def test_images_of_many_uncertain_objects_of_rare_categories_come_first() -> None:
    class Objects:
        def __init__(self, *objects: tuple[int, float, float]) -> None:
            self.categories = np.array([c for c, _, _ in objects])
            self.uncertainty = np.array([u for _, u, _ in objects])
            self.scores = np.array([s for _, _, s in objects])

    images: list[Any] = [
        Objects((1, 0.5, 1), (1, 0.5, 1)),
        Objects((1, 0.7, 1)),
        Objects((2, 0.4, 1)),
        Objects((1, 0.1, 1), (2, 0.6, 0.5)),
    ]
    # First the sum 1.0; then category 1 counts 1 / sqrt(3): 0.404, 0.4 and 0.358; then 1 / 2 of
    # it: 0.4 and 0.35.
    assert most_worthwhile(images, Counter(), 9) == [0, 1, 2, 3]
    # A hundred masks of category 1 are there already: 0.1, 0.07, 0.4 and 0.31.
    assert most_worthwhile(images, Counter({1: 100}), 2) == [2, 3]
    assert most_worthwhile(images[1:], Counter(), 1) == [0]


def test_what_cannot_be_asked_is_said(cache: Path) -> None:
    with pytest.raises(ConfigError, match="--count 0: give 1 or more"):
        suggested(cache, count=0)
    with pytest.raises(ConfigError, match="--threshold 2: class scores"):
        suggested(cache, threshold=2)
