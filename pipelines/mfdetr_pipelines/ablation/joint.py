"""Rows of an ablation that train the detector too (Table 16)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.options import options_of
from mfdetr_cache.errors import ConfigError, MfdetrError, StoppedError
from mfdetr_cache.extraction.content import choices_of
from mfdetr_cache.files import is_taken
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.ops.devices import torch_device
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.ablation.caches import Caches
from mfdetr_pipelines.ablation.extraction import like
from mfdetr_pipelines.ablation.group import measure_head
from mfdetr_pipelines.ablation.job import Job
from mfdetr_pipelines.config.ablate import AblateConfig
from mfdetr_pipelines.config.train_joint import TrainJointConfig
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_joint import VAL_CACHE, run_train_joint


def train_jointly(
    jobs: Sequence[Job], caches: Caches, config: AblateConfig, reporter: Reporter
) -> dict[str, str]:
    """Train jobs one after the other and measure each; the problems of failed rows by name.

    StoppedError if a signal ended it.
    """
    problems: dict[str, str] = {}
    for job in jobs:
        try:
            _train(job, caches, config, reporter)
        except StoppedError:
            raise
        except MfdetrError as error:
            problems[job.name] = str(error)
    return problems


def validation_of(folder: Path, caches: Caches) -> FeatureCache:
    """What the head in a run folder is measured on; a tuned detector has a cache of its own."""
    own = folder / VAL_CACHE
    return FeatureCache.open(own) if own.exists() else caches.validation


def _train(job: Job, caches: Caches, config: AblateConfig, reporter: Reporter) -> None:
    tune = job.plan.row.tune
    assert tune
    if caches.validation_id == "split":
        raise ConfigError("it runs the detector on all images: give --val-cache")
    cache, given = caches.training, config.extraction
    if not given.extract or given.train_annotations is None or given.train_images is None:
        raise ConfigError(
            "it runs the detector: give --extract with --weights, --train-images, "
            "--train-annotations, --images and --val-annotations"
        )
    # Refused before a training that could not be measured.
    measured_on = like(config, caches.validation, job.folder / VAL_CACHE, is_training=False)
    if measured_on.labels.identity():
        raise ConfigError("train-joint knows no --map, --only and --class-agnostic of a cache")
    views = choices_of(cache.root)[1]
    summary = run_train_joint(
        TrainJointConfig(
            weights=measured_on.weights,
            images=given.train_images,
            annotations=given.train_annotations,
            out=job.folder,
            recipe=job.recipe,
            detector=cache.spec.detector,
            tune=tune,
            augment=views.policy if views.count else "none",
            on_bad_annotation="skip",
            limit=cache.layout.num_rows,
            options=options_of(detector_identity(cache.spec)),
            track=(),
            resume=is_taken(job.folder),
            device=config.device,
        ),
        reporter,
    )
    if tune != "nothing":
        run_extract(replace(measured_on, weights=summary.weights), reporter)
    device = torch_device(config.device)
    head = load_head(job.folder).head.to(device)
    own = validation_of(job.folder, caches)
    measure_head(job, own, head, device, reporter, summary.seconds, summary.images_per_second)
