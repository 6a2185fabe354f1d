"""Jobs of an ablation trained and measured: over one read of a cache, or with the detector."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.options import options_of
from mfdetr_cache.errors import ConfigError, HeadError, TrainingError
from mfdetr_cache.evaluation.measure import measure
from mfdetr_cache.extraction.content import choices_of
from mfdetr_cache.files import is_taken, make_folder
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.ops.devices import keep_no_kernels, torch_device
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.training.distributed import Processes
from mfdetr_cache.training.initial_head import new_head
from mfdetr_cache.training.input.loader import CacheSource
from mfdetr_cache.training.learner import Learner, build_learner
from mfdetr_cache.training.loop import TrainingLoop
from mfdetr_cache.training.run import Run, begin_run
from mfdetr_cache.training.run_folder import owned_folder, record_of_cache
from mfdetr_cache.training.settings import require_c1, training_device
from mfdetr_pipelines.ablation.baselines import measure_baseline
from mfdetr_pipelines.ablation.caches import Caches, MissingCache, extraction_of, noting
from mfdetr_pipelines.ablation.job import Job
from mfdetr_pipelines.config.ablate import AblateConfig
from mfdetr_pipelines.config.train_joint import TrainJointConfig
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_joint import VAL_CACHE, TrainJointSummary, run_train_joint


def train_group(
    jobs: Sequence[Job], caches: Caches, config: AblateConfig, reporter: Reporter
) -> dict[str, str]:
    """Train jobs side by side and measure each; returns the problems of failed rows by name.

    The jobs must share their batches; with the detector in every step (Table 16) they train one
    after the other. StoppedError if a signal ended it.
    """
    problems: dict[str, str] = {}
    if jobs[0].row.tune:
        for job in jobs:
            with noting(problems, job.name):
                _train_with_detector(job, caches, config, reporter)
        return problems
    runs: dict[str, Run] = {}
    with contextlib.ExitStack() as owned:
        for job in jobs:
            with noting(problems, job.name):
                if job.row.is_trained:
                    owned.enter_context(owned_folder(job.folder))
                    runs[job.name] = _begin(job, caches, config.device)
        if runs:
            problems |= _train(caches, runs, reporter)
        for job in jobs:
            if job.name not in problems:
                with noting(problems, job.name):
                    _measure(job, runs.get(job.name), caches, config, reporter)
    return problems


def _begin(job: Job, caches: Caches, device_name: str) -> Run:
    """A new run in the job's folder, or the resumed one."""
    train, cache = job.row.recipe.train, caches.training
    device = training_device(device_name, train.amp)
    keep_no_kernels()
    learner = build_learner(train, lambda: new_head(job.row.recipe.head, cache, train), device)
    require_c1(cache, learner.head, train)
    if learner.head.c1 is not None:
        # Not after it was trained.
        caches.validation.require_c1_map("evaluation")
    begun = is_taken(job.folder)
    record = record_of_cache(job.row.recipe.name, train, cache)
    return begin_run(
        learner, job.folder, record, Processes(), track=(), validation=None, resume=begun
    )


def _train(caches: Caches, runs: dict[str, Run], reporter: Reporter) -> dict[str, str]:
    try:
        source = CacheSource(caches.training, [run.learner for run in runs.values()])
        loop = TrainingLoop(source, list(runs.values()), reporter, split_when_full=True)
        loop.run()
    except (HeadError, TrainingError) as error:
        return dict.fromkeys(runs, str(error))
    return {name: str(run.problem) for name, run in runs.items() if run.problem is not None}


def _measure(
    job: Job, run: Run | None, caches: Caches, config: AblateConfig, reporter: Reporter
) -> None:
    cache, baseline = caches.validation, job.row.baseline
    if baseline:
        job.write_result(*measure_baseline(cache, baseline, config, reporter))
    elif run is None:
        make_folder(job.folder)
        head = build_head(job.row.recipe.head, caches.training.spec)
        _measure_head(job, cache, head, config, reporter)
    else:
        run.save_weights()
        head = load_head(job.folder).head
        _measure_head(job, cache, head, config, reporter, run.learner)


def _measure_head(
    job: Job,
    cache: FeatureCache,
    head: MaskHead,
    config: AblateConfig,
    reporter: Reporter,
    trained: Learner | TrainJointSummary | None = None,
) -> None:
    """Measure a head and write the job's result, with the time that it was ``trained``."""
    device = torch_device(config.device)
    measured, masks = measure(cache, head.to(device), device, reporter, ["boundary"])
    metrics = {name: measured.metrics()[name] for name in ("mask", "boundary", "box")}
    seconds, speed = (trained.seconds, trained.images_per_second) if trained else (0.0, 0.0)
    job.write_result(metrics, masks, seconds, speed, 1000 * measured.latency["head"].median)


def validation_of(folder: Path, caches: Caches) -> FeatureCache:
    """What the head in a run folder is measured on; a tuned detector has a cache of its own."""
    own = folder / VAL_CACHE
    return FeatureCache.open(own) if own.exists() else caches.validation


def _train_with_detector(
    job: Job, caches: Caches, config: AblateConfig, reporter: Reporter
) -> None:
    tune = job.row.tune
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
    own = MissingCache(job.folder / VAL_CACHE, caches.validation, {}, is_training=False)
    measured_on = extraction_of(own, config)
    if measured_on.labels.identity():
        raise ConfigError("train-joint knows no --map, --only and --class-agnostic of a cache")
    views = choices_of(cache.root)[1]
    summary = run_train_joint(
        TrainJointConfig(
            weights=measured_on.weights,
            images=given.train_images,
            annotations=given.train_annotations,
            out=job.folder,
            recipe=job.row.recipe,
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
    validation, head = validation_of(job.folder, caches), load_head(job.folder).head
    _measure_head(job, validation, head, config, reporter, summary)
