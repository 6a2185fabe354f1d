"""Reads one row of a cache and builds the regions that each head trains on."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.training.batch import TrainSample
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.learner import Learner
from mfdetr_cache.training.order import steps_per_epoch, view_of_epoch
from mfdetr_cache.training.regions import build_regions
from mfdetr_cache.types import CachedImage

# What decides which regions of an image are trained on, and on which grid.
RegionKey = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image with its regions for every way in which some head wants them."""

    image: CachedImage
    samples: dict[RegionKey, TrainSample]


@dataclass(frozen=True, slots=True)
class Loader:
    """What a reader does for a row and a step; it can be sent to another process.

    Attributes:
        cache: The cache.
        map_names: Maps that some head reads.
        views: Views to walk through.
        num_rows: Rows that are trained on.
        ways: Settings and grid size of every way in which some head wants regions.
        pinned: Whether a GPU copies from what is read by this process.
    """

    cache: FeatureCache
    map_names: tuple[str, ...]
    views: tuple[str, ...]
    num_rows: int
    ways: dict[RegionKey, tuple[TrainConfig, int]]
    pinned: bool

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the cache by itself, and no GPU copies from its memory.
        rest = (self.map_names, self.views, self.num_rows, self.ways, False)
        return _opened_loader, (self.cache.storage, *rest)

    def __call__(self, row: int, step: int) -> LoadedImage:
        """Read a row and build its regions."""
        train = next(iter(self.ways.values()))[0]
        epoch = step // steps_per_epoch(self.num_rows, train.batch_size)
        view = view_of_epoch(self.views, train.seed, row, epoch)
        image = self.cache.read(row, self.map_names, view, pinned=self.pinned)
        samples = {}
        for key, (settings, size) in self.ways.items():
            random = np.random.default_rng((train.seed, step, row))
            samples[key] = TrainSample(image, build_regions(image, settings, size, random))
        return LoadedImage(image, samples)


def _opened_loader(storage: Storage, *rest: Any) -> Loader:  # noqa: ANN401
    return Loader(FeatureCache.open(storage), *rest)


def stream_key(train: TrainConfig) -> tuple[object, ...]:
    """What two heads must have in common to learn from one stream of batches.

    Args:
        train: Training settings.

    Returns:
        The settings that decide which images make up which step.
    """
    order = (train.batch_size, train.seed, train.views, train.shuffle)
    return (*order, train.accumulate, train.label_fraction, train.held_out, train.val_split)


def region_key(learner: Learner) -> RegionKey:
    """What decides the regions of a head and how C1 is cut; heads of one key share both.

    Args:
        learner: The head and its settings.

    Returns:
        The settings that :func:`build_regions` and RoIAlign look at.
    """
    train = learner.train
    return (
        train.match,
        train.min_match_iou,
        train.iou_candidates,
        train.max_regions,
        train.gt_box_share,
        train.box_jitter,
        train.target_scale,
        train.held_out,
        learner.head.config.roi_size,
        learner.head.config.roi_sampling_ratio,
    )
