"""Train a mask network and its detector together, live (Table 16): what freezing is tested against.

Without a cache every step runs the detector. ``--tune nothing`` leaves it frozen, which is the
paper's own way of training; the other two move the encoder and decoder, or everything.
"""

import itertools
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.choices import Policy, Tune
from mfdetr_cache.coco.annotations import CocoSplit, load_coco_split
from mfdetr_cache.coco.image_folder import require_images
from mfdetr_cache.config import to_dict
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.protocol import Detector, TunableDetector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import ConfigError, HeadError, OutputError, StoppedError
from mfdetr_cache.evaluation.measure import EvaluateSummary, measure
from mfdetr_cache.extraction.options import MapOptions
from mfdetr_cache.head.batch import live_groups
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.folder import save_head, save_run_config
from mfdetr_cache.head.mask_embedding import SIDE as MASK_SIDE
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.signals import stop_on_signals
from mfdetr_cache.training.batch import TrainBatch, TrainSample, collate
from mfdetr_cache.training.checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.detector_tuner import DetectorTuner
from mfdetr_cache.training.initial_head import fit_codec
from mfdetr_cache.training.input.live import LiveData, Picture
from mfdetr_cache.training.input.threads import read_ahead
from mfdetr_cache.training.learner import Learner, build_learner
from mfdetr_cache.training.order import rows_of_step, steps_per_epoch
from mfdetr_cache.training.recipes import Recipe
from mfdetr_cache.training.regions import build_regions
from mfdetr_cache.training.run_folder import prepare_folder, versions
from mfdetr_cache.training.run_log import RunLog
from mfdetr_cache.types import CachedImage, DetectorOutput
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import training_device, with_length

DETECTOR_FOLDER = "detector"
VALIDATION_CACHE = "val.zarr"
_LOG_EVERY = 10
# Settings that are about a cache or several processes, and what they must be here.
_WITHOUT_CACHE = {"views": "all", "shuffle": "images", "accumulate": 1, "val_split": 0}


@dataclass(frozen=True, slots=True)
class TrainJointConfig:
    """What ``mfdetr train-joint`` is told.

    Attributes:
        detector: Name of the detector.
        weights: Its folder, file or hub id.
        images: Image folder of the training split.
        annotations: Its COCO instances JSON.
        out: Run folder.
        recipe: Head and training settings.
        tune: What moves beside the head.
        detector_lr: Its learning rate as a share of the head's.
        augment: Show every image in another way in every epoch.
        options: What the user chose about the detector.
        val_images: Image folder of the validation split, measured at the end.
        val_annotations: Its COCO instances JSON.
        epochs: Replaces the recipe's number of steps.
        max_steps: Replaces it too.
        limit: Only the first so many images.
        resume: Go on with the run in ``out``.
        device: Where to train.
    """

    detector: str
    weights: str
    images: Path
    annotations: Path
    out: Path
    recipe: Recipe
    tune: Tune = "encoder-decoder"
    detector_lr: float = 0.1
    augment: Policy | None = None
    options: DetectorOptions = field(default_factory=DetectorOptions)
    val_images: Path | None = None
    val_annotations: Path | None = None
    epochs: float | None = None
    max_steps: int | None = None
    limit: int | None = None
    resume: bool = False
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class TrainJointSummary:
    """What a joint training did.

    Attributes:
        out: Run folder.
        weights: What to pass as ``--weights`` to extract with the detector as it is now.
        tuned_parameters: Parameters of the detector that moved.
        steps: Optimiser steps done in all.
        seconds: Time of the steps.
        images_per_second: Images trained on per second.
        mask_loss: Mean loss of the head over the last steps.
        box_loss: The same of the detector; 0 where it stays frozen.
        validation: Metrics on the validation split, where one was given.
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


def run_train_joint(config: TrainJointConfig, reporter: Reporter) -> TrainJointSummary:
    """Train, save head and detector, and measure them where a validation split is given.

    Args:
        config: What to do.
        reporter: Who is told about progress.

    Returns:
        What was done.

    Raises:
        DatasetError: If images or annotations cannot be used.
        DetectorError: If the detector cannot be loaded.
        HeadError: If the run folder is taken, or there is nothing to resume.
        TrainingError: If there is nothing to learn from, or a loss is not finite.
        StoppedError: If a signal ended it early; the run can be resumed.
    """
    if (config.val_images is None) != (config.val_annotations is None):
        raise ConfigError("--val-images and --val-annotations go together")
    if not 0 < config.detector_lr <= 1:
        raise ConfigError(f"--detector-lr {config.detector_lr}: a share above 0 and at most 1")
    _require_live(config.recipe.train)
    split = load_coco_split(config.annotations).first(config.limit)
    require_images(config.images, split, "check --images")
    if config.val_images is not None and config.val_annotations is not None:
        # Not after hours of training.
        validation = load_coco_split(config.val_annotations)
        require_images(config.val_images, validation, "check --val-images")
    detector = load_detector(config.detector, config.weights, config.options)
    data = LiveData(split, config.images, detector, config.recipe.train, config.augment)
    train = with_length(config.recipe.train, config.epochs, config.max_steps, len(data.rows))
    device = training_device(config.device, train.amp)
    detector = detector.to(device)
    tuner = DetectorTuner(detector, config.tune, train, config.detector_lr)
    learner = build_learner(train, lambda: _new_head(config, detector, data), device)
    document = _document(config, train, detector, split, data.label_categories)
    same = ("head", "train", "joint")
    prepare_folder(config.out, config.recipe.head, document, resume=config.resume, same=same)
    if config.resume and (config.out / CHECKPOINT_FILE).is_file():
        _restore(config.out, learner, tuner)
    reporter.say(
        f"recipe {config.recipe.name}, {config.detector} {_WORDS[config.tune]}: "
        f"{tuner.num_parameters / 1e6:.1f} M of its parameters move; {train.steps} steps of "
        f"{train.batch_size} images ({len(data.rows)} with objects)"
    )
    _train(config, data, detector, learner, tuner, reporter)
    save_head(config.out, learner.result_weights())
    weights = config.weights
    if config.tune != "nothing":
        assert isinstance(detector, TunableDetector)
        weights = detector.save_weights(config.out / DETECTOR_FOLDER)
        # The head belongs to the detector as it is now.
        tuned = load_detector(config.detector, weights, config.options)
        document = {**document, "detector": detector_identity(tuned.spec)}
    save_run_config(config.out, config.recipe.head, document)
    return TrainJointSummary(
        out=str(config.out),
        weights=weights,
        tuned_parameters=tuner.num_parameters,
        steps=learner.step,
        seconds=learner.seconds,
        images_per_second=learner.images / max(learner.seconds, 1e-9),
        mask_loss=learner.recent_loss(),
        box_loss=tuner.recent_loss(),
        validation=_validate(config, weights, learner, reporter),
    )


_WORDS: dict[Tune, str] = {
    "nothing": "frozen",
    "encoder-decoder": "tuned but for its backbone",
    "all": "tuned as a whole",
}


def _require_live(train: TrainConfig) -> None:
    """Refuse settings that would do nothing here."""
    if train.amp == "fp16":
        raise ConfigError("a joint training has no amp=fp16: use amp=bf16 or amp=off")
    for name, value in _WITHOUT_CACHE.items():
        if getattr(train, name) != value:
            raise ConfigError(
                f"--set {name}={getattr(train, name)} does nothing without a cache; leave it out"
            )


def _new_head(config: TrainJointConfig, detector: Detector, data: LiveData) -> MaskHead:
    head = build_head(config.recipe.head, detector.spec)
    if head.codec is not None:
        fit_codec(head.codec, data.rows, lambda row: data.masks(row, MASK_SIDE))
    return head


def _train(
    config: TrainJointConfig,
    data: LiveData,
    detector: Detector,
    learner: Learner,
    tuner: DetectorTuner,
    reporter: Reporter,
) -> None:
    train, first = learner.train, learner.step
    per_epoch = steps_per_epoch(len(data.rows), train.batch_size)
    stop, log = threading.Event(), RunLog(config.out)
    learner.head.train()
    reporter.start("train", train.steps, "steps", done=first)
    saved = time.monotonic()
    steps = read_ahead(
        lambda row, step: data.picture(row, step // per_epoch),
        lambda step: rows_of_step(data.rows, train.batch_size, train.seed, step),
        range(first, train.steps),
        train.reader_threads(on_gpu=learner.device.type == "cuda"),
    )
    with stop_on_signals(stop):
        for pictures in itertools.takewhile(lambda _: not stop.is_set(), steps):
            started = time.perf_counter()
            _one_step(pictures, detector, learner, tuner)
            learner.images += len(pictures)
            learner.seconds += time.perf_counter() - started
            losses = {"loss": learner.recent_loss(), "box_loss": tuner.recent_loss()}
            if learner.step % _LOG_EVERY == 0 or learner.is_done:
                log.add({"step": learner.step, **losses, "seconds": round(learner.seconds, 3)})
            speed = learner.images / max(learner.seconds, 1e-9)
            reporter.advance(
                note=f"{speed:.2f} images/s, masks {losses['loss']:.3f}, "
                f"boxes {losses['box_loss']:.3f}"
            )
            if time.monotonic() - saved > 60 * train.checkpoint_minutes:
                _save(config.out, learner, tuner, reporter, going_on=True)
                saved = time.monotonic()
        steps.close()
    reporter.finish()
    log.close()
    _save(config.out, learner, tuner, reporter, going_on=learner.is_done)
    if not learner.is_done:
        raise StoppedError(
            f"stopped by a signal at step {learner.step}; go on with the same command and --resume"
        )


def _one_step(
    pictures: Sequence[Picture], detector: Detector, learner: Learner, tuner: DetectorTuner
) -> None:
    """Both learn from some images; what flows between them goes through queries and maps."""
    device, step = learner.device, learner.step
    outputs = [detector.forward(p.pixel_values[None].to(device)) for p in pictures]
    batch = _live_batch(pictures, outputs, learner, step)
    tuner.begin(outputs, pictures)
    if len(batch.labels):
        learner.learn([batch], 0, len(batch.labels))
    else:
        learner.pass_over()
    tuner.finish(step)


def _live_batch(
    pictures: Sequence[Picture],
    outputs: Sequence[DetectorOutput],
    learner: Learner,
    step: int,
) -> TrainBatch:
    """The batch a cache would give, with gradients into the detector."""
    train, size = learner.train, learner.head.config.roi_size
    samples = []
    for picture, output in zip(pictures, outputs, strict=True):
        image = CachedImage(
            row=picture.row,
            image_id=picture.image_id,
            file_name=picture.file_name,
            geometry=picture.geometry,
            class_logits=output.class_logits[0].detach().cpu().numpy(),
            boxes_cxcywh_norm=output.boxes_cxcywh_norm[0].detach().cpu().numpy(),
            queries=output.queries[0].detach().cpu().numpy(),
            maps={},
            ground_truth=picture.truth,
        )
        random = np.random.default_rng((train.seed, step, picture.row))
        samples.append(TrainSample(image, build_regions(image, train, size, random)))
    names = learner.head.map_names
    groups = live_groups(outputs, [p.geometry for p in pictures], names)
    batch = collate(samples, names, learner.device, groups)
    chosen = [
        output.queries[0][torch.from_numpy(sample.regions.query_index).to(learner.device)]
        for output, sample in zip(outputs, samples, strict=True)
    ]
    return replace(batch, inputs=replace(batch.inputs, queries=torch.cat(chosen)))


def _document(
    config: TrainJointConfig,
    train: TrainConfig,
    detector: Detector,
    split: CocoSplit,
    label_categories: Sequence[int],
) -> dict[str, Any]:
    identity = detector_identity(detector.spec)
    return {
        "recipe": config.recipe.name,
        "train": to_dict(train),
        "detector": identity,
        "joint": {
            "tune": config.tune,
            "detector_lr": config.detector_lr,
            "augment": config.augment,
            "began_with": identity,
            "dataset": {"name": split.name, "annotations_sha256": split.sha256},
            "num_images": len(split.images),
        },
        "categories": [{"id": c.category_id, "name": c.name} for c in split.categories],
        "label_categories": list(label_categories),
        "command": sys.argv,
        "versions": versions(),
    }


def _save(
    out: Path, learner: Learner, tuner: DetectorTuner, reporter: Reporter, *, going_on: bool
) -> None:
    """A checkpoint; where there is something left to do, a full disk ends nothing yet."""
    try:
        save_checkpoint(out, {"learner": learner.state(), "tuner": tuner.state()})
    except OutputError as error:
        if not going_on:
            raise
        reporter.warn(f"{error}; training goes on")


def _restore(out: Path, learner: Learner, tuner: DetectorTuner) -> None:
    try:
        state = load_checkpoint(out)
        learner.restore(state["learner"])
        tuner.restore(state["tuner"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise HeadError(f"{out / CHECKPOINT_FILE} does not fit this run ({error})") from error


def _validate(
    config: TrainJointConfig, weights: str, learner: Learner, reporter: Reporter
) -> EvaluateSummary | None:
    """The validation split through the detector as it is now, and the head on what it gave."""
    if config.val_images is None or config.val_annotations is None:
        return None
    path = config.out / VALIDATION_CACHE
    extract = ExtractConfig(
        weights=weights,
        images=config.val_images,
        annotations=config.val_annotations,
        cache=path,
        detector=config.detector,
        options=config.options,
        maps=MapOptions(preset="fp16"),
        device=config.device,
    )
    run_extract(extract, reporter)
    learner.head.load_state_dict(learner.result_weights())
    found, _ = measure(
        FeatureCache.open(path), learner.head, learner.device, reporter, ["baselines"]
    )
    return found
