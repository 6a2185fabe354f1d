"""Micro-batches without a loop."""

from collections.abc import Sequence

import numpy as np
import torch

from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.training.batch import TrainBatch, collate
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.regions import RegionSettings, RegionTargets, build_regions
from mfdetr_cache.types import CachedImage


def regions_of(
    images: Sequence[CachedImage], head: MaskHead, train: TrainConfig
) -> list[RegionTargets]:
    """The regions of each image, drawn by its row."""
    settings = RegionSettings.of(train, head.config)
    return [build_regions(i, settings, np.random.default_rng(i.row)) for i in images]


def batch_of(
    images: Sequence[CachedImage], head: MaskHead, train: TrainConfig, device: str = "cpu"
) -> TrainBatch:
    """Some images as one micro-batch."""
    regions = regions_of(images, head, train)
    return collate(images, regions, head.map_names, torch.device(device))
