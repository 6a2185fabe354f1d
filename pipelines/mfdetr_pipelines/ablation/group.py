"""Train a group of jobs over one read of the cache, and measure each."""

import contextlib
from collections.abc import Sequence

import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import HeadError, MfdetrError, TrainingError
from mfdetr_cache.evaluation.measure import measure
from mfdetr_cache.files import is_taken, make_folder
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.ops.devices import keep_no_kernels, torch_device
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.training.distributed import Processes
from mfdetr_cache.training.initial_head import new_head
from mfdetr_cache.training.input.loader import CacheSource
from mfdetr_cache.training.learner import build_learner
from mfdetr_cache.training.loop import TrainingLoop
from mfdetr_cache.training.run import Run, begin_run
from mfdetr_cache.training.run_folder import owned_folder, record_of_cache
from mfdetr_cache.training.settings import require_c1, training_device
from mfdetr_pipelines.ablation.baselines import SamSource, measure_baseline
from mfdetr_pipelines.ablation.caches import Caches
from mfdetr_pipelines.ablation.job import Job


def train_group(
    jobs: Sequence[Job],
    caches: Caches,
    device_name: str,
    sam: SamSource | None,
    reporter: Reporter,
) -> dict[str, str]:
    """Train jobs side by side and measure each; returns the problems of failed rows by name.

    The jobs must share their batches. StoppedError if a signal ended it.
    """
    device = torch_device(device_name)
    problems: dict[str, str] = {}
    runs: dict[str, Run] = {}
    with contextlib.ExitStack() as owned:
        for job in jobs:
            try:
                if job.plan.is_trained:
                    owned.enter_context(owned_folder(job.folder))
                    runs[job.name] = _begin(job, caches, device_name)
            except MfdetrError as error:
                problems[job.name] = str(error)
        if runs:
            problems |= _train(caches, runs, reporter)
        for job in jobs:
            if job.name in problems:
                continue
            try:
                _measure(job, runs.get(job.name), caches, device, sam, reporter)
            except MfdetrError as error:
                problems[job.name] = str(error)
    return problems


def _begin(job: Job, caches: Caches, device_name: str) -> Run:
    """A new run in the job's folder, or the resumed one."""
    train, cache = job.recipe.train, caches.training
    device = training_device(device_name, train.amp)
    keep_no_kernels()
    learner = build_learner(train, lambda: new_head(job.recipe.head, cache, train), device)
    require_c1(cache, learner.head, train)
    if learner.head.c1 is not None:
        # Not after it was trained.
        caches.validation.require_c1_map("evaluation")
    begun = is_taken(job.folder)
    record = record_of_cache(job.recipe.name, train, cache)
    return begin_run(
        learner, job.folder, record, Processes(), track=(), validation=None, resume=begun
    )


def _train(caches: Caches, runs: dict[str, Run], reporter: Reporter) -> dict[str, str]:
    """Train all runs to the end; returns problems by row."""
    try:
        source = CacheSource(caches.training, [run.learner for run in runs.values()])
        loop = TrainingLoop(source, list(runs.values()), reporter, split_when_full=True)
        loop.run()
    except (HeadError, TrainingError) as error:
        return dict.fromkeys(runs, str(error))
    return {name: str(run.problem) for name, run in runs.items() if run.problem is not None}


def _measure(
    job: Job,
    run: Run | None,
    caches: Caches,
    device: torch.device,
    sam: SamSource | None,
    reporter: Reporter,
) -> None:
    """Measure a baseline, a trained head, or one without weights to train."""
    cache, baseline = caches.validation, job.plan.row.baseline
    if baseline:
        measured, masks = measure_baseline(cache, baseline, reporter, sam=sam, device=device)
        job.write_result({name: m.to_dict() for name, m in measured.items()}, masks)
    elif run is None:
        make_folder(job.folder)
        head = build_head(job.recipe.head, caches.training.spec).to(device)
        measure_head(job, cache, head, device, reporter)
    else:
        run.save_weights()
        head = load_head(job.folder).head.to(device)
        learner = run.learner
        speed = learner.images_per_second
        measure_head(job, cache, head, device, reporter, learner.seconds, speed)


def measure_head(
    job: Job,
    cache: FeatureCache,
    head: MaskHead,
    device: torch.device,
    reporter: Reporter,
    seconds: float = 0.0,
    speed: float = 0.0,
) -> None:
    """Measure a head and write the job's result; ``seconds`` and ``speed`` are of its training."""
    measured, masks = measure(cache, head, device, reporter, ["boundary"])
    metrics = {name: measured.metrics()[name] for name in ("mask", "boundary", "box")}
    job.write_result(metrics, masks, seconds, speed, 1000 * measured.latency["head"].median)
