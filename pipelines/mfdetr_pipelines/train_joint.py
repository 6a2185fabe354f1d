"""Train a mask network and its detector together, without a cache (Table 16).

Every step runs the detector: frozen with ``--tune nothing``, as in the paper, or with its encoder
and decoder, or all of it, tuned.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.choices import Policy
from mfdetr_cache.coco.annotations import load_coco_split, require_images
from mfdetr_cache.detectors.protocol import Detector, TunableDetector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.evaluation.measure import EvaluateSummary, measure
from mfdetr_cache.extraction.options import MapOptions
from mfdetr_cache.head.folder import load_head, save_run_config
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.reporter import Reporter, SilentReporter
from mfdetr_cache.training.config import Length
from mfdetr_cache.training.detector_tuner import TUNED, JointLearner
from mfdetr_cache.training.distributed import training_processes
from mfdetr_cache.training.initial_head import with_weights_of
from mfdetr_cache.training.input.live import LiveImages, LiveSource
from mfdetr_cache.training.learner import seeded_head
from mfdetr_cache.training.loop import train_alone
from mfdetr_cache.training.run import Validation, begin_run
from mfdetr_cache.training.run_folder import owned_run
from mfdetr_cache.training.run_log import require_trackers
from mfdetr_cache.training.settings import (
    require_live,
    require_validation,
    training_device,
    with_batch_size,
    with_length,
)
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.config.train_joint import TrainJointConfig
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.pages.chart import write_curves

DETECTOR_FOLDER = "detector"
VAL_CACHE = "val.zarr"


@dataclass(frozen=True, slots=True)
class TrainJointSummary:
    """Result of a joint training.

    Attributes:
        weights: The tuned detector, for ``--weights`` of ``mfdetr extract``.
        steps: Optimiser steps, including those before a resume.
        mask_loss: Mean loss of the head over the last 50 steps.
        box_loss: The same of the detector; 0 where it is frozen.
    """

    out: str
    weights: str
    tuned_parameters: int
    steps: int
    seconds: float
    images_per_second: float
    mask_loss: float
    box_loss: float
    validation: EvaluateSummary | None
    best_AP: float | None
    best_step: int | None


def run_train_joint(
    config: TrainJointConfig, reporter: Reporter, on_step: Callable[[int], None] | None = None
) -> TrainJointSummary:
    """Train, save head and detector, and measure them on the validation split, if any.

    Works under ``torchrun``. Raises DatasetError, DetectorError, HeadError (run folder in use, or
    nothing to resume), TrainingError (no objects, or a loss that is not finite) or StoppedError
    (stopped by a signal; can be resumed).
    """
    _require_possible(config)
    split = load_coco_split(
        config.annotations, config.images, on_bad=config.on_bad_annotation, limit=config.limit
    )
    split.tell_faults(reporter)
    require_images(config.images, split, "check --images")
    names = [category.name for category in split.categories]
    detector = load_detector(config.detector, config.weights, config.options, names)
    train = with_batch_size(config.recipe.train, config.batch_size)
    images = LiveImages(split, config.images, detector, train, _augment(config))
    train = with_length(train, config.length, len(images.rows))
    initial = None if config.from_head is None else load_head(config.from_head)
    device = training_device(config.device, train.amp)
    with training_processes(device) as processes, owned_run(config.out, processes):
        if not processes.is_first:
            reporter = SilentReporter()
        detector = detector.to(device)
        head = seeded_head(
            train.seed,
            lambda: with_weights_of(images.new_head(config.recipe.head), initial),
            device,
        )
        learner = JointLearner(head, train, detector, config.tune, config.detector_lr, processes)
        is_tuned = config.tune != "nothing"
        source = LiveSource(images, detector, learner, processes, is_tuned=is_tuned)

        joint = {
            "tune": config.tune,
            "detector_lr": config.detector_lr,
            "augment": _augment(config),
        }
        record = images.record(config.recipe.name, train, joint, initial)
        run = begin_run(
            learner,
            config.out,
            record,
            processes,
            track=config.track,
            validation=_validation(config, detector, device),
            resume="longer" if config.resume and config.length != Length() else config.resume,
            same=("head", "train", "joint", "initial"),
        )
        reporter.say(
            f"recipe {config.recipe.name}, {detector.spec.name} {TUNED[config.tune]}: "
            f"{learner.num_tuned / 1e6:.1f} M of its parameters are trained; {train.steps} "
            f"steps of {train.batch_size} images ({len(images.rows)} with objects)"
        )
        is_auto = config.batch_size == "auto"
        train_alone(source, run, reporter, processes, split_when_full=is_auto, on_step=on_step)
        weights = config.weights
        if processes.is_first:
            weights = _saved_weights(config, detector)
            if is_tuned:
                # The head belongs to the detector as it is now.
                tuned = load_detector(config.detector, weights, config.options, names)
                record = replace(record, detector=detector_identity(tuned.spec))
            save_run_config(config.out, head.config, record)
        measured = run.end(reporter, processes)
        if processes.is_first:
            write_curves(config.out)
    return TrainJointSummary(
        out=str(config.out),
        weights=weights,
        tuned_parameters=learner.num_tuned,
        steps=learner.step,
        seconds=learner.seconds,
        images_per_second=learner.images_per_second,
        mask_loss=learner.recent_loss(),
        box_loss=learner.recent_box_loss(),
        validation=measured,
        best_AP=run.best_ap,
        best_step=run.best_step,
    )


def _require_possible(config: TrainJointConfig) -> None:
    """Refuse settings that would fail late or have no effect."""
    wanted = config.validation
    require_validation(wanted.val_every, "--val-images", wanted.val_images)
    if wanted.val_images is not None and wanted.val_annotations is not None:
        split = load_coco_split(
            wanted.val_annotations,
            wanted.val_images,
            on_bad=config.on_bad_annotation,
            needs="boxes",
        )
        require_images(wanted.val_images, split, "check --val-images")
    require_live(config.recipe.train, is_tuned=config.tune != "nothing")
    require_trackers(config.track)


def _augment(config: TrainJointConfig) -> Policy | None:
    return None if config.augment == "none" else config.augment


def _saved_weights(config: TrainJointConfig, detector: Detector) -> str:
    """The ``--weights`` of the tuned detector."""
    if config.tune == "nothing":
        return config.weights
    assert isinstance(detector, TunableDetector)
    return detector.save_weights(config.out / DETECTOR_FOLDER)


def _validation(
    config: TrainJointConfig, detector: Detector, device: torch.device
) -> Validation | None:
    """A validation that caches the split with the current detector, and measures the head on it."""
    wanted, path = config.validation, config.out / VAL_CACHE
    images, annotations = wanted.val_images, wanted.val_annotations
    if images is None or annotations is None:
        return None

    def measured(head: MaskHead, reporter: Reporter) -> EvaluateSummary:
        if config.tune != "nothing":
            # It holds what other weights gave.
            shutil.rmtree(path, ignore_errors=True)
        extract = ExtractConfig(
            weights=_saved_weights(config, detector),
            images=images,
            annotations=annotations,
            cache=path,
            on_bad_annotation=config.on_bad_annotation,
            detector=config.detector,
            options=config.options,
            maps=MapOptions(preset="fp16"),
            device=config.device,
        )
        run_extract(extract, reporter)
        return measure(FeatureCache.open(path), head, device, reporter, ["baselines"])[0]

    # The best head of a detector that goes on changing would be of no use.
    return Validation(measured, wanted.val_every, keeps_best=config.tune == "nothing")
