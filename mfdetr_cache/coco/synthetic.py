"""A drawn COCO-format dataset: textured backgrounds, overlapping shapes, exact visible masks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from mfdetr_cache.files import make_folder, write_atomically, writing
from mfdetr_cache.ops.masks import encode_mask, plain_rle

SHAPES = ("disc", "box", "triangle", "star", "ring", "cross")
# Less of a shape than this share is not annotated: nobody could say what it is.
_LEAST_VISIBLE = 0.25
_SUPERSAMPLE = 3


def draw_scene(seed: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """One scene and its objects; the same seed always gives the same scene.

    The image has 140 to 220 pixels a side; each visible object has ``label`` (an index into
    SHAPES), ``mask`` (visible pixels, bool) and ``box_xywh``.
    """
    random = np.random.default_rng((7919, seed))
    height, width = (int(v) for v in random.integers(140, 221, 2))
    pixels = _texture(random, (height, width))
    layers: list[tuple[int, NDArray[np.bool_]]] = []
    for _ in range(int(random.integers(2, 8))):
        label = int(random.integers(len(SHAPES)))
        mask = _shape_mask(random, SHAPES[label], (height, width))
        if mask.sum() < 40:
            continue
        paint = _texture(random, (height, width))
        pixels[mask] = paint[mask]
        layers.append((label, mask))
    image = Image.fromarray(pixels.astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    objects: list[dict[str, Any]] = []
    covered = np.zeros((height, width), dtype=np.bool_)
    for label, mask in reversed(layers):
        visible = mask & ~covered
        covered |= mask
        if visible.sum() < max(40, _LEAST_VISIBLE * mask.sum()):
            continue
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        x0, y0 = int(columns[0]), int(rows[0])
        box = (x0, y0, int(columns[-1]) + 1 - x0, int(rows[-1]) + 1 - y0)
        objects.append({"label": label, "mask": visible, "box_xywh": box})
    return image, objects


def write_synthetic_split(folder: Path, name: str, first_seed: int, count: int) -> Path:
    """A split in COCO's layout: ``folder/name/*.png`` and ``folder/instances_name.json``.

    Splits must use other seeds than one another.
    """
    make_folder(folder / name)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for seed in range(first_seed, first_seed + count):
        image, objects = draw_scene(seed)
        file_name = f"{seed:08d}.png"
        with writing(folder / name / file_name):
            image.save(folder / name / file_name)
        images.append(
            {"id": seed, "file_name": file_name, "height": image.height, "width": image.width}
        )
        for found in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": seed,
                    "category_id": found["label"] + 1,
                    "bbox": list(found["box_xywh"]),
                    "area": float(found["mask"].sum()),
                    "iscrowd": 0,
                    "segmentation": plain_rle(encode_mask(found["mask"])),
                }
            )
    categories = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
    path = folder / f"instances_{name}.json"
    document = {"images": images, "annotations": annotations, "categories": categories}
    write_atomically(path, json.dumps(document).encode())
    return path


def _texture(random: np.random.Generator, size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """A random colour with a gradient, stripes or blotches of random strength, and noise."""
    colour = random.uniform(20, 235, 3)
    y, x = np.mgrid[: size_hw[0], : size_hw[1]].astype(np.float64)
    angle, kind = random.uniform(0, math.pi), int(random.integers(3))
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == 0:
        pattern = along / max(size_hw) * 2 - 1
    elif kind == 1:
        pattern = np.sin(along * random.uniform(0.15, 0.8))
    else:
        across = y * math.cos(angle) - x * math.sin(angle)
        scale = random.uniform(0.05, 0.3)
        pattern = np.sin(along * scale) * np.sin(across * scale)
    strength = random.uniform(5, 40) * random.choice([-1, 1], 3)
    noise = random.normal(0, random.uniform(2, 10), (*size_hw, 1))
    texture: NDArray[np.float64] = colour + pattern[..., None] * strength + noise
    return texture.clip(0, 255)


def _shape_mask(
    random: np.random.Generator, shape: str, size_hw: tuple[int, int]
) -> NDArray[np.bool_]:
    """A filled shape at a random place, size, aspect and angle; it may leave the image."""
    height, width = size_hw
    radius = math.exp(random.uniform(math.log(9), math.log(62)))
    stretch = random.uniform(0.7, 1.4)
    angle = random.uniform(0, 2 * math.pi)
    centre = random.uniform(0.05, 0.95, 2) * (width, height)

    def place(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        placed = []
        for px, py in points:
            sx, sy = px * radius * stretch, py * radius / stretch
            rx = sx * math.cos(angle) - sy * math.sin(angle) + centre[0]
            ry = sx * math.sin(angle) + sy * math.cos(angle) + centre[1]
            placed.append((rx * _SUPERSAMPLE, ry * _SUPERSAMPLE))
        return placed

    canvas = Image.new("L", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
    draw = ImageDraw.Draw(canvas)
    for points, fill in _outlines(shape):
        draw.polygon(place(points), fill=fill)
    small = canvas.resize((width, height), Image.Resampling.BOX)
    mask: NDArray[np.bool_] = np.asarray(small) >= 128
    return mask


def _outlines(shape: str) -> list[tuple[list[tuple[float, float]], int]]:
    """Polygons in a unit circle, painted in order; 0 cuts a hole."""

    def circle(radius: float, corners: int, start: float = 0.0) -> list[tuple[float, float]]:
        turns = [start + 2 * math.pi * i / corners for i in range(corners)]
        return [(radius * math.cos(t), radius * math.sin(t)) for t in turns]

    if shape == "disc":
        return [(circle(1.0, 40), 255)]
    if shape == "box":
        return [([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], 255)]
    if shape == "triangle":
        return [(circle(1.1, 3), 255)]
    if shape == "star":
        outer, inner = circle(1.15, 5), circle(0.48, 5, math.pi / 5)
        return [([p for pair in zip(outer, inner, strict=True) for p in pair], 255)]
    if shape == "ring":
        return [(circle(1.0, 40), 255), (circle(0.5, 40), 0)]
    a, b = 1.0, 0.34
    corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b)]
    return [(corners + [(-x, -y) for x, y in corners], 255)]
