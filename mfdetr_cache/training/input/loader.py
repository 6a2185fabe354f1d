"""Training steps from a cache."""

import contextlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.evaluation.detections import detected_queries
from mfdetr_cache.head.batch import map_groups
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.training.batch import TrainBatch, TrainSample, collate
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.distributed import Processes, split
from mfdetr_cache.training.input.readers import read_in_processes, read_in_threads
from mfdetr_cache.training.input.source import Step, staged
from mfdetr_cache.training.learner import Learner
from mfdetr_cache.training.order import Order, chosen_views, trainable_rows, view_of_epoch
from mfdetr_cache.training.regions import RegionSettings, build_regions


@dataclass(frozen=True, slots=True)
class Loader:
    """Reads a row and builds its regions; picklable, so that reader processes can use it.

    Maps and region settings are those of any head; ``detected`` if one attends to all detected
    queries; ``pinned`` reads into memory for copies to a GPU.
    """

    cache: FeatureCache
    map_names: tuple[str, ...]
    views: tuple[str, ...]
    steps_per_epoch: int
    seed: int
    regions: tuple[RegionSettings, ...]
    detected: bool
    pinned: bool

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the cache by itself, and no GPU copies from its memory.
        order = (self.views, self.steps_per_epoch, self.seed)
        rest = (self.map_names, *order, self.regions, self.detected, False)
        return _opened_loader, (self.cache.storage, self.cache.annotations.number, *rest)

    def __call__(self, row: int, step: int) -> TrainSample:
        """Read a row for a step."""
        view = view_of_epoch(self.views, self.seed, row, step // self.steps_per_epoch)
        image = self.cache.read(row, self.map_names, view, pinned=self.pinned)
        return TrainSample(
            image,
            {
                regions: build_regions(
                    image, regions, np.random.default_rng((self.seed, step, row))
                )
                for regions in self.regions
            },
            detected_queries(image, self.cache.spec) if self.detected else None,
        )


def _opened_loader(storage: Storage, annotations: int, *rest: Any) -> Loader:  # noqa: ANN401
    return Loader(FeatureCache.open(storage, annotations), *rest)


class CacheSource:
    """Steps from a complete cache, read once for all heads.

    All learners must have the same :func:`stream_key`. ``stage`` prepares the next step while this
    one is computed; it is on by default beside a GPU, since a CPU would only share its cores.
    ``regions`` are the distinct region settings of the heads, ``order`` gives the rows of each
    step. TrainingError if no image has objects, ConfigError if there are fewer views than wanted.
    """

    def __init__(
        self,
        cache: FeatureCache,
        learners: Sequence[Learner],
        processes: Processes | None = None,
        *,
        stage: bool | None = None,
    ) -> None:
        assert len({stream_key(learner.train) for learner in learners}) == 1
        self._train = learners[0].train
        self._device = learners[0].device
        self._cache = cache
        self._views = chosen_views(cache.layout.views, self._train.views)
        self._processes = processes or Processes()
        self._map_names = tuple(dict.fromkeys(n for one in learners for n in one.head.map_names))
        self._stage = self._device.type == "cuda" if stage is None else stage
        # Where steps are staged, a head that reads C1 cuts it for all that want the same regions.
        self._heads: dict[RegionSettings, MaskHead] = {}
        for learner in sorted(learners, key=lambda one: one.head.c1 is None):
            self._heads.setdefault(learner.regions, learner.head)
        self._detected = any(learner.head.config.query_o2o for learner in learners)
        self.regions = tuple(self._heads)
        rows = tuple(trainable_rows(cache, self._train))
        parts = None
        if self._train.shuffle == "parts":
            parts = tuple(row // cache.layout.images_per_part for row in rows)
        self.order = Order(rows, self._train.batch_size, self._train.seed, parts)

    def steps(self, numbers: range) -> Generator[Step, None, None]:
        """Steps in order, read ahead and, beside a GPU, copied to it ahead."""
        steps = self._read(numbers)
        return staged(steps, self._train.accumulate, self._device) if self._stage else steps

    def _read(self, numbers: range) -> Generator[Step, None, None]:
        train, on_gpu = self._train, self._device.type == "cuda"
        load = Loader(
            self._cache,
            self._map_names,
            self._views,
            self.order.steps_per_epoch,
            train.seed,
            self.regions,
            self._detected,
            pinned=on_gpu,
        )
        num_threads = train.reader_threads(on_gpu=on_gpu)
        num_processes = train.reader_processes(on_gpu=on_gpu)
        if num_processes:
            samples = read_in_processes(
                load,
                self._own_rows,
                numbers,
                num_processes,
                batch_size=train.batch_size,
                largest_maps=self._cache.largest_maps(self._map_names),
                device=self._device,
                threads_meanwhile=num_threads,
            )
        else:
            samples = read_in_threads(load, self._own_rows, numbers, num_threads)
        with contextlib.closing(samples):
            for number, own in zip(numbers, samples, strict=True):
                counts = {r: sum(len(sample.regions[r]) for sample in own) for r in self.regions}
                yield _CacheStep(self, own, len(self.order.rows_of(number)), len(own), counts)

    def _own_rows(self, step: int) -> list[int]:
        return self._processes.share_of(self.order.rows_of(step))

    def collated(
        self, samples: Sequence[TrainSample], micro_batches: int
    ) -> dict[RegionSettings, list[TrainBatch]]:
        """A step's micro-batches per region settings; maps are decoded once for all heads."""
        batches: dict[RegionSettings, list[TrainBatch]] = {regions: [] for regions in self._heads}
        for part in filter(None, split(samples, micro_batches)):
            images = [sample.image for sample in part]
            groups = map_groups(images, self._map_names, self._device)
            detected = [s.detected for s in part if s.detected is not None] or None
            for regions, head in self._heads.items():
                targets = [sample.regions[regions] for sample in part]
                batch = collate(images, targets, self._map_names, self._device, groups, detected)
                if self._stage:
                    # Nothing learned takes part in it: it need not wait for the step before.
                    batch = replace(batch, inputs=head.prepare(batch.inputs))
                batches[regions].append(batch)
        return batches


@dataclass
class _CacheStep:
    source: CacheSource
    samples: list[TrainSample]
    num_images: int
    num_own_images: int
    counts: Mapping[RegionSettings, int]
    micro_batches: int = 0
    prepared: Mapping[RegionSettings, list[TrainBatch]] = field(default_factory=dict)

    def prepare(self, micro_batches: int) -> None:
        if not self.prepared or self.micro_batches != micro_batches:
            self.release()
            self.prepared = self.source.collated(self.samples, micro_batches)
            self.micro_batches = micro_batches

    def batches(self, regions: RegionSettings) -> Iterable[TrainBatch]:
        return self.prepared[regions]

    def release(self) -> None:
        self.prepared = {}


def stream_key(train: TrainConfig) -> tuple[object, ...]:
    """The settings that decide the images of each step; learners of one source have equal keys."""
    order = (train.batch_size, train.seed, train.views, train.shuffle)
    return (*order, train.accumulate, train.label_fraction, train.held_out, train.val_split)
