"""Training targets of a cached image: matched queries, their boxes, and the masks inside."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.matching.matchers import Matches, match_by_iou, match_one_to_one, with_least_side
from mfdetr_cache.matching.objects import trainable_objects
from mfdetr_cache.ops.boxes import box_iou, cxcywh_to_xyxy
from mfdetr_cache.ops.masks import rasterise_in_boxes
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.types import CachedImage

_WHOLE_IMAGE = np.array([0, 0, 1, 1], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class RegionSettings:
    """Settings that decide the regions of a head and how C1 is cropped.

    Fields are those of :class:`TrainConfig` and :class:`HeadConfig` with the same names. Heads with
    equal settings share regions and crops.
    """

    match: Literal["hungarian", "iou"]
    min_match_iou: float
    iou_candidates: int
    max_regions: int
    gt_box_share: float
    box_jitter: float
    target_scale: int
    held_out: tuple[int, ...]
    grid_size: int
    roi_sampling_ratio: int
    roialign: bool

    @classmethod
    def of(cls, train: TrainConfig, head: HeadConfig) -> "RegionSettings":
        """The fields of both configurations."""
        of_head = ("grid_size", "roi_sampling_ratio", "roialign")
        names = [f.name for f in fields(cls)]
        return cls(**{n: getattr(head if n in of_head else train, n) for n in names})


@dataclass(frozen=True, slots=True)
class RegionTargets:
    """The R regions of one image that are trained on.

    Attributes:
        query_index: Shape (R,).
        boxes_xyxy_norm: Relative to the resized image, shape (R, 4).
        labels: Label of the object, -1 where the detector has none, shape (R,).
        masks: Coverage of the object over the box, in [0, 1], shape (R, t, t); without RoIAlign
            over the whole image, in cells of four input pixels, shape (R, h, w).
        outside: Area of the object outside the box, over the box's area, shape (R,).
    """

    query_index: NDArray[np.int64]
    boxes_xyxy_norm: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.float32]
    outside: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.query_index)


def build_regions(
    image: CachedImage, config: RegionSettings, random: np.random.Generator
) -> RegionTargets:
    """Match, jitter and rasterise one image, of which the maps are not needed.

    ``random`` decides the jitter and which regions are kept beyond ``max_regions``. The result is
    empty where no object is matched.
    """
    objects = trainable_objects(image.ground_truth, config.held_out)
    side = config.grid_size * config.target_scale
    # Masks over the whole image have the cells of the finest map that queries are compared with.
    input_height, input_width = image.geometry.input_hw
    grid_hw = (side, side) if config.roialign else (-(-input_height // 4), -(-input_width // 4))
    if not len(objects):
        return _no_regions(grid_hw)
    height, width = image.geometry.original_hw
    scale = np.array([width, height, width, height], dtype=np.float32)
    truth_xyxy = image.ground_truth.boxes_xyxy[objects] / scale
    labels = image.ground_truth.labels[objects]
    if config.match == "iou":
        logits = torch.from_numpy(image.class_logits)
        predicted = cxcywh_to_xyxy(torch.from_numpy(image.boxes_cxcywh_norm))
        target = torch.from_numpy(truth_xyxy)
        candidates, least = config.iou_candidates, config.min_match_iou
        matches = match_by_iou(logits, predicted, target, candidates, least)
    else:
        held = image.c1_crops.query_index if image.c1_crops is not None else None
        matches = match_one_to_one(
            image.class_logits, image.boxes_cxcywh_norm, labels, truth_xyxy, held
        )
    matches = _choose(matches, config, random)
    if not len(matches.query_index):
        return _no_regions(grid_hw)
    # A handful of numbers: torch would let go of the GIL for each operation, numpy does not.
    boxes = _corners(image.boxes_cxcywh_norm[matches.query_index])
    boxes = _jitter(boxes, truth_xyxy[matches.object_index], config, random)
    runs = [image.ground_truth.run_lengths[i] for i in objects[matches.object_index]]
    seen = boxes if config.roialign else np.tile(_WHOLE_IMAGE, (len(boxes), 1))
    in_pixels = (seen * scale).astype(np.float64)
    masks, outside = rasterise_in_boxes(runs, (height, width), in_pixels, grid_hw)
    return RegionTargets(matches.query_index, boxes, labels[matches.object_index], masks, outside)


def _corners(boxes_cxcywh: NDArray[np.float32]) -> NDArray[np.float32]:
    centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
    return np.concatenate((centre - half, centre + half), axis=1)


def _no_regions(grid_hw: tuple[int, int]) -> RegionTargets:
    return RegionTargets(
        np.zeros(0, dtype=np.int64),
        np.zeros((0, 4), dtype=np.float32),
        np.zeros(0, dtype=np.int64),
        np.zeros((0, *grid_hw), dtype=np.float32),
        np.zeros(0, dtype=np.float32),
    )


def _choose(matches: Matches, config: RegionSettings, random: np.random.Generator) -> Matches:
    keep = np.flatnonzero(matches.iou >= config.min_match_iou)
    if config.max_regions and len(keep) > config.max_regions:
        keep = np.sort(random.choice(keep, config.max_regions, replace=False))
    return Matches(matches.query_index[keep], matches.object_index[keep], matches.iou[keep])


def _jitter(
    boxes: NDArray[np.float32],
    target: NDArray[np.float32],
    config: RegionSettings,
    random: np.random.Generator,
) -> NDArray[np.float32]:
    """Replace some boxes by the object's own and shift the sides of all."""
    if config.gt_box_share:
        swap = random.random(len(boxes)) < config.gt_box_share
        boxes = np.where(swap[:, None], target, boxes)
    if config.box_jitter:
        size = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        moved = boxes + size * random.uniform(-config.box_jitter, config.box_jitter, boxes.shape)
        # A box that was moved off its object would have nothing but background to learn from.
        overlap = box_iou(torch.from_numpy(moved), torch.from_numpy(target)).diagonal().numpy()
        before = box_iou(torch.from_numpy(boxes), torch.from_numpy(target)).diagonal().numpy()
        good = (overlap >= np.minimum(before, 0.5))[:, None]
        boxes = np.where(good, moved, boxes)
    return with_least_side(boxes.astype(np.float32))
