"""Small COCO-format datasets, drawn."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from mfdetr_pipelines.config.extract import ExtractConfig
from PIL import Image, ImageDraw

from mfdetr_cache.coco.annotations import CocoSplit
from mfdetr_cache.extraction.options import MapOptions, ViewOptions
from mfdetr_cache.reporter import SilentReporter

CATEGORIES = [{"id": 3, "name": "ellipse"}, {"id": 7, "name": "box"}, {"id": 11, "name": "crowd"}]


def write_scenes(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Images with ellipses and rectangles in ``folder/images``, annotations in ``folder``."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        height, width = (int(v) for v in random.integers(70, 130, 2))
        noise = random.integers(0, 120, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        draw = ImageDraw.Draw(picture)
        image_id = 100 + 5 * number
        name = f"{image_id:012d}.png"
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for kind in range(2):
            w, h = (int(v) for v in random.integers(20, 50, 2))
            x, y = int(random.integers(0, width - w)), int(random.integers(0, height - h))
            colour = tuple(int(c) for c in random.integers(130, 255, 3))
            if kind == 0:
                draw.ellipse((x, y, x + w, y + h), fill=colour)
                angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
                points = np.stack(
                    (x + w / 2 + w / 2 * np.cos(angles), y + h / 2 + h / 2 * np.sin(angles)), axis=1
                )
                polygon = points.flatten().tolist()
            else:
                draw.rectangle((x, y, x + w, y + h), fill=colour)
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": 1000 + len(annotations),
                    "image_id": image_id,
                    "category_id": CATEGORIES[kind]["id"],
                    "bbox": [x, y, w, h],
                    "area": float(w * h),
                    "iscrowd": 0,
                    "segmentation": [polygon],
                }
            )
        picture.save(folder / "images" / name)
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    save_annotations(folder, document)
    return document


def save_annotations(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps(document))
    return path


def load_annotations(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "instances.json").read_text())
    return document


def extract_config(folder: Path, weights: str, cache: Path, **changes: Any) -> ExtractConfig:
    """An extraction of drawn scenes on the CPU; the fields of maps may be given by themselves."""
    # Tests compare with the detector's own numbers.
    maps = {"preset": "fp16"} | {
        f.name: changes.pop(f.name) for f in fields(MapOptions) if f.name in changes
    }
    settings: dict[str, Any] = {
        "weights": weights,
        "images": folder / "images",
        "annotations": folder / "instances.json",
        "cache": cache,
        "maps": MapOptions(**maps),
        "device": "cpu",
        **changes,
    }
    if isinstance(settings.get("views"), int):
        settings["views"] = ViewOptions(settings["views"])
    return ExtractConfig(**settings)


def written(tmp_path: Path, document: object) -> Path:
    """The file of an annotation document."""
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(document))
    return path


def told(split: CocoSplit) -> list[str]:
    """What is said of a file that was read."""
    reporter = SilentReporter()
    split.tell_faults(reporter)
    return reporter.messages
