"""Views: seeded augmentations of images and their ground truth, each run through the detector.

A stored map must never be flipped or rescaled (the result is not what the detector would have
computed); a view is a picture of its own. It is cut out of the original, mirrored, and resized
once: cropping before the resize instead of in between gives the same window and loses no pixels
to a second interpolation.
"""

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mfdetr_cache.choices import Policy
from mfdetr_cache.ops.masks import RunLengths, crop_run_lengths
from mfdetr_cache.types import GroundTruth

# Deformable DETR's training transforms (COCO, its datasets/coco.py restated in detectors.md).
_SHORT_SIDES = tuple(range(480, 801, 32))
_TEST_SHORT_SIDE = 800
_SHORT_SIDES_BEFORE_CROP = (400, 500, 600)
_CROP_RANGE = (384, 600)
_FLIP_SHARE = _CROP_SHARE = 0.5
# Large-scale jittering (Ghiasi et al., 2021): 0.1 to 2 times a canvas of 1024 x 1024.
_JITTER_CANVAS, _JITTER_RANGE = 1024, (0.1, 2.0)
# Where a window leaves the image; the mean colour of ImageNet, zero after normalisation.
_FILL_RGB = (124, 116, 104)


@dataclass(frozen=True, slots=True)
class ViewTransform:
    """How the picture of a view is made from the original.

    Attributes:
        crop_xyxy: Window in original pixels; it may leave the image where the input has a fixed
            size.
        flip: Mirror the window left to right.
        shortest_edge: Shorter side of the network input; 0 for the detector's own.
    """

    crop_xyxy: tuple[int, int, int, int]
    flip: bool
    shortest_edge: int

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the view's picture in original pixels."""
        x0, y0, x1, y1 = self.crop_xyxy
        return y1 - y0, x1 - x0


def identity_transform(size_hw: tuple[int, int]) -> ViewTransform:
    """The whole image as it is: the view ``base``."""
    return ViewTransform((0, 0, size_hw[1], size_hw[0]), flip=False, shortest_edge=0)


def sample_transform(
    policy: Policy, seed: int, view: str, image_id: int, size_hw: tuple[int, int], *, fixed: bool
) -> ViewTransform:
    """The transform of one view of one image; depends on nothing but its arguments.

    ``deformable-detr``: flip, multi-scale resize, random crop before it every second time.
    ``large-scale-jitter``: flip, and a window of 0.1 to 2 times the image (Table 11). Of a detector
    whose input has one ``fixed`` size the picture becomes smaller by a wider window, filled to the
    right and below as a batch of mixed sizes is padded.
    """
    random = np.random.default_rng((seed, zlib.crc32(view.encode()), image_id))
    flip = bool(random.random() < _FLIP_SHARE)
    if policy == "large-scale-jitter":
        return _jitter(random, size_hw, flip=flip, fixed=fixed)
    crop = identity_transform(size_hw).crop_xyxy
    if random.random() < _CROP_SHARE:
        crop = _random_crop(random, size_hw)
    shortest = int(random.choice(_SHORT_SIDES))
    if not fixed:
        return ViewTransform(crop, flip, shortest)
    x0, y0, x1, y1 = crop
    wider = _TEST_SHORT_SIDE / shortest
    window = (x0, y0, x0 + round((x1 - x0) * wider), y0 + round((y1 - y0) * wider))
    return ViewTransform(window, flip, shortest_edge=0)


def _random_crop(
    random: np.random.Generator, size_hw: tuple[int, int]
) -> tuple[int, int, int, int]:
    """DETR's RandomSizeCrop on the image resized to 400, 500 or 600, in original pixels."""
    scale = int(random.choice(_SHORT_SIDES_BEFORE_CROP)) / min(size_hw)
    smallest, largest = _CROP_RANGE
    starts, lengths = [], []
    for side in (size_hw[1], size_hw[0]):
        resized = max(smallest, int(side * scale))
        wanted = int(random.integers(smallest, min(resized, largest) + 1))
        length = min(side, max(1, round(wanted / scale)))
        lengths.append(length)
        starts.append(int(random.integers(0, side - length + 1)))
    (x0, y0), (width, height) = starts, lengths
    return x0, y0, x0 + width, y0 + height


def _jitter(
    random: np.random.Generator, size_hw: tuple[int, int], *, flip: bool, fixed: bool
) -> ViewTransform:
    low, high = _JITTER_RANGE
    scale = float(random.uniform(low, high)) * _JITTER_CANVAS / max(size_hw)
    window = max(1, round(_JITTER_CANVAS / scale))
    bounds = []
    for side in (size_hw[1], size_hw[0]):
        length = window if fixed else min(side, window)
        start = int(random.integers(0, max(0, side - length) + 1))
        bounds.append((start, start + length))
    (x0, x1), (y0, y1) = bounds
    shortest = 0 if fixed else max(1, round(min(y1 - y0, x1 - x0) * scale))
    return ViewTransform((x0, y0, x1, y1), flip, shortest)


def transform_image(image: Image.Image, transform: ViewTransform) -> Image.Image:
    """The picture of a view, in original resolution.

    A window of the image, mirrored if asked for; filled with ImageNet's mean colour outside.
    """
    x0, y0, x1, y1 = transform.crop_xyxy
    if (x0, y0, x1, y1) != (0, 0, image.width, image.height):
        window = Image.new("RGB", (x1 - x0, y1 - y0), _FILL_RGB)
        inside = image.crop((max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height)))
        window.paste(inside, (max(-x0, 0), max(-y0, 0)))
        image = window
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if transform.flip else image


def transform_ground_truth(
    truth: GroundTruth, size_hw: tuple[int, int], transform: ViewTransform
) -> GroundTruth:
    """The objects of a view, pixel by pixel those of its picture.

    An object without a pixel in the view is left out; boxes are clipped to it, areas reduced by
    the share of pixels that was cut off. Of an object that has a box only, pixels are the
    box's.
    """
    if transform == identity_transform(size_hw):
        return truth
    x0, y0, _, _ = transform.crop_xyxy
    view_h, view_w = transform.size_hw
    boxes = truth.boxes_xyxy - np.array([x0, y0, x0, y0], dtype=np.float32)
    boxes = np.clip(boxes, 0, np.array([view_w, view_h, view_w, view_h], dtype=np.float32))
    if transform.flip:
        boxes = np.stack(
            (view_w - boxes[:, 2], boxes[:, 1], view_w - boxes[:, 0], boxes[:, 3]), axis=1
        )
    kept: list[int] = []
    runs: list[RunLengths] = []
    areas: list[float] = []
    for index, run_lengths in enumerate(truth.run_lengths):
        cut = run_lengths
        pixels, before = _area(boxes[index]), _area(truth.boxes_xyxy[index])
        if len(run_lengths):
            cut = crop_run_lengths(run_lengths, size_hw, transform.crop_xyxy, flip=transform.flip)
            pixels, before = _pixels(cut), _pixels(run_lengths)
        if pixels and (boxes[index, 2:] > boxes[index, :2]).all():
            kept.append(index)
            runs.append(cut)
            areas.append(float(truth.areas[index]) * pixels / before)
    rows: NDArray[np.int64] = np.array(kept, dtype=np.int64)
    return GroundTruth(
        annotation_ids=truth.annotation_ids[rows],
        category_ids=truth.category_ids[rows],
        labels=truth.labels[rows],
        boxes_xyxy=boxes[rows].astype(np.float32).reshape(-1, 4),
        areas=np.array(areas, dtype=np.float64),
        is_crowd=truth.is_crowd[rows],
        run_lengths=tuple(runs),
    )


def _area(box_xyxy: NDArray[np.float32]) -> float:
    x0, y0, x1, y1 = box_xyxy.tolist()
    return float((x1 - x0) * (y1 - y0))


def _pixels(run_lengths: RunLengths) -> float:
    return float(run_lengths[1::2].sum(dtype=np.int64))
