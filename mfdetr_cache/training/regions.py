"""Training targets of a cached image: matched queries, their boxes, and the masks inside."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.mask_embedding import SIDE as CODED_SIDE
from mfdetr_cache.matching.matchers import (
    Matches,
    focal_cost,
    match_by_iou,
    match_one_to_one,
    with_least_side,
)
from mfdetr_cache.matching.objects import object_masks, trainable_objects
from mfdetr_cache.ops.boxes import box_iou, cxcywh_to_xyxy
from mfdetr_cache.ops.masks import rasterise_in_boxes
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.types import ABSENT_LOGIT, CachedImage


@dataclass(frozen=True, slots=True)
class RegionSettings:
    """Settings that decide the regions of a head and how C1 is cropped.

    Fields are those of :class:`TrainConfig` and :class:`HeadConfig` with the same names. Heads with
    equal settings share regions and crops.
    """

    match: Literal["hungarian", "iou", "set"]
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
class SetTargets:
    """The G objects of one image, for R regions that are matched in the loss.

    Attributes:
        boxes_xyxy_norm: Relative to the resized image, shape (G, 4).
        class_cost: Focal cost of each region's class scores for each object, shape (R, G).
        resized_hw: Size of the resized image in network input pixels.
    """

    boxes_xyxy_norm: NDArray[np.float32]
    class_cost: NDArray[np.float32]
    resized_hw: tuple[int, int]


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
        objects: With ``match="set"``, what the loss matches regions to; labels, masks and outside
            are then of the G objects, and the masks over their own boxes, (G, 28, 28).
    """

    query_index: NDArray[np.int64]
    boxes_xyxy_norm: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.float32]
    outside: NDArray[np.float32]
    objects: SetTargets | None = None

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
    if config.match == "set":
        grid_hw = (CODED_SIDE, CODED_SIDE)
    if not len(objects):
        return _no_regions(grid_hw)
    height, width = image.geometry.original_hw
    scale = np.array([width, height, width, height], dtype=np.float32)
    truth_xyxy = image.ground_truth.boxes_xyxy[objects] / scale
    labels = image.ground_truth.labels[objects]
    if config.match == "set":
        return _set_regions(image, truth_xyxy, labels, config)
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
    whole = np.array(image.geometry.input_xyxy_norm, dtype=np.float32)
    seen = boxes if config.roialign else np.tile(whole, (len(boxes), 1))
    in_pixels = (seen * scale).astype(np.float64)
    masks, outside = rasterise_in_boxes(runs, (height, width), in_pixels, grid_hw)
    return RegionTargets(matches.query_index, boxes, labels[matches.object_index], masks, outside)


def _set_regions(
    image: CachedImage,
    truth_xyxy_norm: NDArray[np.float32],
    labels: NDArray[np.int64],
    config: RegionSettings,
) -> RegionTargets:
    """The best queries of an image and its objects, unmatched."""
    best = image.class_logits.max(axis=1)
    chosen = np.argsort(-best, kind="stable")[: config.iou_candidates]
    chosen = np.sort(chosen[best[chosen] > ABSENT_LOGIT])
    if not len(chosen):
        return _no_regions((CODED_SIDE, CODED_SIDE))
    masks = object_masks(
        image.ground_truth, image.geometry.original_hw, config.held_out, CODED_SIDE
    )
    return RegionTargets(
        chosen,
        with_least_side(_corners(image.boxes_cxcywh_norm[chosen])),
        labels,
        masks,
        np.zeros(len(labels), dtype=np.float32),
        SetTargets(
            truth_xyxy_norm,
            focal_cost(image.class_logits[chosen][:, labels]),
            image.geometry.resized_hw,
        ),
    )


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
