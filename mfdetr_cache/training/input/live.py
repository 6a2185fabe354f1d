"""Training steps from a live detector: images are decoded, augmented and detected in every step."""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfdetr_cache.choices import Policy
from mfdetr_cache.coco.annotations import CocoSplit
from mfdetr_cache.coco.augmentation import (
    identity_transform,
    sample_transform,
    transform_ground_truth,
    transform_image,
)
from mfdetr_cache.coco.labelled import label_split
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.protocol import Detector, fixed_input_hw
from mfdetr_cache.errors import TrainingError
from mfdetr_cache.evaluation.detections import detected_queries
from mfdetr_cache.head.batch import live_groups
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import HeadFolder, RunRecord
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.matching.objects import trainable_objects
from mfdetr_cache.training.batch import TrainBatch, collate
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.distributed import Processes, split
from mfdetr_cache.training.initial_head import fitted_head
from mfdetr_cache.training.input.readers import read_in_threads
from mfdetr_cache.training.input.source import Step
from mfdetr_cache.training.learner import Learner
from mfdetr_cache.training.order import Order, kept_rows
from mfdetr_cache.training.regions import RegionSettings, RegionTargets, build_regions
from mfdetr_cache.training.run_folder import record_of
from mfdetr_cache.types import CachedImage, DetectorOutput, GroundTruth, ImageGeometry


@dataclass(frozen=True, slots=True)
class LiveImage:
    """An augmented image of one epoch, by its row in the split; ``pixel_values`` are (3, H, W).

    Geometry and objects are those of the augmented image.
    """

    image_id: int
    file_name: str
    row: int
    pixel_values: Tensor
    geometry: ImageGeometry
    truth: GroundTruth


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveBatch(TrainBatch):
    """A micro-batch with the detector's output for each image, with gradients where it is tuned.

    ``num_objects`` are the trainable ones of the whole step, over all processes.
    """

    outputs: tuple[DetectorOutput, ...]
    images: tuple[LiveImage, ...]
    num_objects: int


class LiveImages:
    """The images of a split with trainable objects; TrainingError if there is none.

    ``augment`` None shows images unchanged. DatasetError if the detector's labels and the dataset's
    categories have nothing in common. ``rows`` are indices in the split, increasing;
    ``label_categories`` holds the category id of each label of the detector, -1 for none.
    """

    def __init__(
        self,
        split: CocoSplit,
        folder: Path,
        detector: Detector,
        train: TrainConfig,
        augment: Policy | None,
    ) -> None:
        labelled = label_split(split, detector.spec)
        self.label_categories = labelled.match.label_categories
        self._truth = [labelled.objects_of(e) for e in split.images]
        self._split = split
        self._folder = folder
        self._detector = detector
        self._augment = augment
        self._train = train
        self._fixed = fixed_input_hw(detector) is not None
        rows = [i for i, t in enumerate(self._truth) if len(trainable_objects(t, train.held_out))]
        if not rows:
            raise TrainingError(f"no image of {split.name} has an object to learn from")
        self.rows = kept_rows(rows, train.label_fraction, train.seed)

    def new_head(self, config: HeadConfig) -> MaskHead:
        """A head with fresh weights; a mask basis, if any, is fitted to the annotations."""
        return fitted_head(
            config,
            self._detector.spec,
            lambda: self.rows,
            lambda row: (self._truth[row], self._split.images[row].size_hw),
            self._train,
        )

    def record(
        self, recipe: str, train: TrainConfig, joint: dict[str, Any], initial: HeadFolder | None
    ) -> RunRecord:
        """The record of a run on these images; ``joint`` holds its settings besides ``train``."""
        split = self._split
        joint = joint | {
            "began_with": detector_identity(self._detector.spec),
            "dataset": {"name": split.name, "annotations_sha256": split.sha256},
            "num_images": len(split.images),
        }
        return record_of(
            recipe,
            train,
            self._detector.spec,
            initial,
            joint=joint,
            categories=split.plain_categories,
            label_categories=self.label_categories,
        )

    def read(self, row: int, epoch: int) -> LiveImage:
        """The augmented image of a row in an epoch."""
        entry = self._split.images[row]
        transform = identity_transform(entry.size_hw)
        if self._augment is not None:
            transform = sample_transform(
                self._augment,
                self._train.seed,
                f"epoch-{epoch}",
                entry.image_id,
                entry.size_hw,
                fixed=self._fixed,
            )
        image = load_image(self._folder / entry.file_name, entry.size_hw)
        edge = transform.shortest_edge
        return LiveImage(
            entry.image_id,
            entry.file_name,
            row,
            self._detector.preprocess(transform_image(image, transform), edge),
            self._detector.input_geometry(transform.size_hw, edge),
            transform_ground_truth(self._truth[row], entry.size_hw, transform),
        )


class LiveSource:
    """Steps from images and a detector on the learner's device, tuned or frozen."""

    def __init__(
        self,
        images: LiveImages,
        detector: Detector,
        learner: Learner,
        processes: Processes | None = None,
        *,
        is_tuned: bool,
    ) -> None:
        train = learner.train
        self.order = Order(tuple(images.rows), train.batch_size, train.seed)
        self.spec = detector.spec
        self._images = images
        self._detector = detector
        self.learner = learner
        self._processes = processes or Processes()
        self.is_tuned = is_tuned

    def steps(self, numbers: range) -> Generator[Step, None, None]:
        """Steps in order; images are read ahead, the detector runs when a step is prepared."""
        device, per_epoch = self.learner.device, self.order.steps_per_epoch
        read = read_in_threads(
            lambda row, step: self._images.read(row, step // per_epoch),
            lambda step: self._processes.share_of(self.order.rows_of(step)),
            numbers,
            self.learner.train.reader_threads(on_gpu=device.type == "cuda"),
        )
        with contextlib.closing(read):
            for number, images in zip(numbers, read, strict=True):
                objects = sum(len(trainable_objects(image.truth)) for image in images)
                objects_of = self._processes.gather([objects], device)
                num_objects = sum(count for (count,) in objects_of)
                num_images = len(self.order.rows_of(number))
                yield _LiveStep(self, number, images, num_images, len(images), num_objects)

    def detect(self, images: Sequence[LiveImage], *, gradients: bool) -> list[DetectorOutput]:
        """The detector's output for each image, with or without gradients."""
        device = self.learner.device
        with torch.set_grad_enabled(gradients):
            return [self._detector.forward(i.pixel_values[None].to(device)) for i in images]


@dataclass
class _LiveStep:
    """A step of a :class:`LiveSource`.

    A tuned detector's activations of a whole step would take the memory that micro-batches save.
    Its images then pass through it twice: without gradients to count the regions, by which every
    loss is divided, and with gradients for their own micro-batch.
    """

    source: LiveSource
    number: int
    images: list[LiveImage]
    num_images: int
    num_own_images: int
    num_objects: int
    micro_batches: int = 0
    counts: Mapping[RegionSettings, int] = field(default_factory=dict)
    is_prepared: bool = False
    outputs: list[DetectorOutput] = field(default_factory=list)
    regions: list[RegionTargets] = field(default_factory=list)

    def prepare(self, micro_batches: int) -> None:
        if self.is_prepared and self.micro_batches == micro_batches:
            return
        self.release()
        source, settings = self.source, self.source.learner.regions
        twice = source.is_tuned and micro_batches > 1
        outputs = source.detect(self.images, gradients=not twice)
        self.regions = []
        for image, output in zip(self.images, outputs, strict=True):
            random = np.random.default_rng((source.learner.train.seed, self.number, image.row))
            self.regions.append(build_regions(_without_maps(image, output), settings, random))
        self.counts = {settings: sum(len(targets) for targets in self.regions)}
        self.outputs = [] if twice else outputs
        self.micro_batches = micro_batches
        self.is_prepared = True

    def batches(self, regions: RegionSettings) -> Iterator[LiveBatch]:
        assert regions == self.source.learner.regions
        for part in filter(None, split(range(len(self.images)), self.micro_batches)):
            images = [self.images[i] for i in part]
            if self.outputs:
                outputs = [self.outputs[i] for i in part]
            else:
                outputs = self.source.detect(images, gradients=True)
            yield self._collated(images, outputs, [self.regions[i] for i in part])

    def release(self) -> None:
        self.outputs = []
        self.is_prepared = False

    def _collated(
        self,
        images: Sequence[LiveImage],
        outputs: Sequence[DetectorOutput],
        regions: Sequence[RegionTargets],
    ) -> LiveBatch:
        """The batch a cache would give, but with gradients into maps and queries."""
        learner = self.source.learner
        names = learner.head.map_names
        groups = live_groups(outputs, [image.geometry for image in images], names)
        cached = [_without_maps(i, o) for i, o in zip(images, outputs, strict=True)]
        detected = None
        if learner.head.config.query_o2o:
            detected = [detected_queries(image, self.source.spec) for image in cached]
        batch = collate(cached, regions, names, learner.device, groups, detected)
        queries = [
            output.queries[0][torch.from_numpy(targets.query_index).to(learner.device)]
            for output, targets in zip(outputs, regions, strict=True)
        ]
        whole = replace(batch, inputs=replace(batch.inputs, queries=torch.cat(queries)))
        return LiveBatch(
            **{f.name: getattr(whole, f.name) for f in fields(whole)},
            outputs=tuple(outputs),
            images=tuple(images),
            num_objects=self.num_objects,
        )


def _without_maps(image: LiveImage, output: DetectorOutput) -> CachedImage:
    """The image as a cache would hold it, but not quantised and without maps."""
    return CachedImage(
        row=image.row,
        image_id=image.image_id,
        file_name=image.file_name,
        geometry=image.geometry,
        class_logits=output.class_logits[0].detach().cpu().numpy(),
        boxes_cxcywh_norm=output.boxes_cxcywh_norm[0].detach().cpu().numpy(),
        queries=output.queries[0].detach().cpu().numpy(),
        maps={},
        ground_truth=image.truth,
    )
