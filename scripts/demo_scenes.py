"""Drawn scenes for the training of the demo's detector, each shown in another way every time."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mfdetr_cache.coco.synthetic import draw_scene

SIDE = 160


@dataclass(frozen=True)
class Batch:
    """Scenes as the network takes them, and what is in them.

    Attributes:
        pixels: Shape (B, 3, SIDE, SIDE), in [0, 1].
        covers: Shape over each pixel, counted from 1; 0 is background; shape (B, SIDE, SIDE).
        labels: One tensor of labels per scene.
        boxes: One tensor per scene, shape (G, 4), cxcywh in [0, 1].
    """

    pixels: Tensor
    covers: Tensor
    labels: list[Tensor]
    boxes: list[Tensor]


class Scenes:
    """Drawn scenes in memory, each shown in another way every time.

    Args:
        first_seed: Seed of the first.
        count: How many.
    """

    def __init__(self, first_seed: int, count: int) -> None:
        self.pixels = np.empty((count, SIDE, SIDE, 3), np.uint8)
        self.covers = np.empty((count, SIDE, SIDE), np.uint8)
        self.objects: list[np.ndarray] = []
        with ProcessPoolExecutor(2) as pool:
            drawn = pool.map(_draw, range(first_seed, first_seed + count), chunksize=50)
            for index, (pixels, covers, objects) in enumerate(drawn):
                self.pixels[index], self.covers[index] = pixels, covers
                self.objects.append(objects)

    def batches(self, size: int, seed: int = 0) -> Iterator[Batch]:
        """Batches without end; every scene once before any comes again.

        Args:
            size: Scenes of a batch.
            seed: Seed of order and looks.

        Yields:
            Batches.
        """
        random = np.random.default_rng(seed)
        while True:
            order = random.permutation(len(self.pixels))
            for first in range(0, len(order) - size + 1, size):
                yield self._batch(order[first : first + size], random)

    def _batch(self, rows: np.ndarray, random: np.random.Generator) -> Batch:
        """Turned, mirrored, colours exchanged and inverted: no shape is another one after that."""
        pixels, covers, labels, boxes = [], [], [], []
        for row in rows:
            turns, mirrored = int(random.integers(4)), bool(random.integers(2))
            image = self.pixels[row][..., random.permutation(3)]
            if random.random() < 0.5:
                image = 255 - image
            cover, objects = self.covers[row], self.objects[row]
            x, y, w, h = objects[:, 1:].T
            if mirrored:
                image, cover, x = image[:, ::-1], cover[:, ::-1], 1 - x
            for _ in range(turns):
                # np.rot90 turns counterclockwise: (x, y) goes to (y, 1 - x).
                x, y, w, h = y, 1 - x, h, w
            pixels.append(np.rot90(image, turns).transpose(2, 0, 1))
            covers.append(np.rot90(cover, turns))
            labels.append(torch.from_numpy(objects[:, 0].astype(np.int64)))
            boxes.append(torch.from_numpy(np.stack([x, y, w, h], 1)))
        return Batch(
            torch.from_numpy(np.stack(pixels)).float() / 255,
            torch.from_numpy(np.stack(covers)).long(),
            labels,
            boxes,
        )


def _draw(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, covering shapes, and (G, 5) label and cxcywh in [0, 1]."""
    image, objects = draw_scene(seed)
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    covers = np.zeros((image.height, image.width), np.uint8)
    for found in objects:
        covers[found["mask"]] = found["label"] + 1
    size = np.array([image.width, image.height] * 2, np.float32)
    rows = np.zeros((len(objects), 5), np.float32)
    for row, found in zip(rows, objects, strict=True):
        box = np.array(found["box_xywh"], np.float32) / size
        row[0], row[1:3], row[3:] = found["label"], box[:2] + box[2:] / 2, box[2:]
    small = Image.fromarray(covers).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return pixels, np.asarray(small), rows
