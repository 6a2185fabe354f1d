"""Ablate: many heads over one read of a cache, every row for every seed, one table at the end."""

import functools
import gzip
import json
import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.open import Location
from mfdetr_cache.config import completed, to_dict
from mfdetr_cache.errors import ConfigError, HeadError, MfdetrError, StoppedError
from mfdetr_cache.evaluation.bootstrap import PairedDifference, WeightedAP, compare_all
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics, Result
from mfdetr_cache.evaluation.measure import ground_truth_of, measure
from mfdetr_cache.extraction.cluster import Cluster
from mfdetr_cache.files import make_folder, write_atomically
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.folder import load_head, save_head
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity, differences, require_same
from mfdetr_cache.ops.devices import torch_device
from mfdetr_cache.reporter import Reporter, SilentReporter
from mfdetr_cache.training.config import FREE_FIELDS, TrainConfig
from mfdetr_cache.training.distributed import split
from mfdetr_cache.training.initial_head import new_head
from mfdetr_cache.training.input.loader import stream_key
from mfdetr_cache.training.learner import build_learner
from mfdetr_cache.training.loop import Run, TrainingLoop
from mfdetr_cache.training.recipes import Recipe
from mfdetr_cache.training.run_folder import TrainHeadConfig, prepare_folder, run_document
from mfdetr_cache.training.run_log import RunLog
from mfdetr_pipelines.ablation.baselines import SamSource, measure_baseline
from mfdetr_pipelines.ablation.rows import AblationRow, RowPlan, plan_rows
from mfdetr_pipelines.evaluate import json_results
from mfdetr_pipelines.ray_engine import on_cluster
from mfdetr_pipelines.train_head import require_c1, training_device

RESULT_FILE = "result.json"
MASKS_FILE = "masks.json.gz"
# Draws of the paired bootstrap; the interval's ends move by a few hundredths of its width.
_BOOTSTRAP_SAMPLES = 400
# Steps that are timed for a dry run, after one that is not.
_TIMED_STEPS = 2


@dataclass(frozen=True, slots=True)
class RowResult:
    """What came of a row.

    Attributes:
        plan: Its cost.
        seeds: Mask metrics of each seed that was trained.
        train_seconds: Mean training time of a seed.
        images_per_second: Mean training speed.
        head_ms: Median time of the mask network per evaluated image, in milliseconds.
        problem: Why it has no result; empty if it has.
        against_first: Its AP beside the first row's, with a 95 % interval; None for the first.
        total_hours: Hours of its training and of what had to come before; None if not known.
    """

    plan: RowPlan
    seeds: tuple[CocoMetrics, ...] = ()
    train_seconds: float = 0.0
    images_per_second: float = 0.0
    head_ms: float = 0.0
    problem: str = ""
    against_first: PairedDifference | None = None
    total_hours: float | None = None

    def mean(self, name: str = "AP") -> float | None:
        """Mean of a metric over the seeds.

        Args:
            name: ``AP``, ``AP50`` and so on.

        Returns:
            In [0, 1]; None without a result.
        """
        values = [getattr(m, name) for m in self.seeds]
        return statistics.mean(values) if values else None

    def spread(self, name: str = "AP") -> float | None:
        """Standard deviation of a metric over the seeds.

        Args:
            name: ``AP``, ``AP50`` and so on.

        Returns:
            In [0, 1]; None for fewer than two seeds.
        """
        values = [getattr(m, name) for m in self.seeds]
        return statistics.stdev(values) if len(values) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values; metrics in [0, 1]."""
        metrics = {n: self.mean(n) for n in ("AP", "AP50", "AP75", "APS", "APM", "APL")}
        return {
            **self.plan.to_dict(),
            **metrics,
            "AP_spread": self.spread(),
            "seeds": [m.to_dict() for m in self.seeds],
            "train_seconds": self.train_seconds,
            "images_per_second": self.images_per_second,
            "head_ms": self.head_ms,
            "total_hours": self.total_hours,
            "problem": self.problem,
            "against_first": None if self.against_first is None else asdict(self.against_first),
        }


@dataclass(frozen=True, slots=True)
class AblateConfig:
    """What ``mfdetr ablate`` is told.

    Attributes:
        rows: What to compare.
        cache: Cache of the training split.
        val_cache: Cache of the split to measure on; None for the images of ``cache`` that the rows'
            setting ``val_split`` leaves out of training.
        out: Where runs and tables go.
        seeds: Seeds 0 to N - 1 of every row.
        device: Where to train.
        engine: Here, or groups of heads as tasks on a Ray cluster whose nodes share the folders.
        cluster: Which cluster.
        sam: Weights and images for the baseline ``sam``.
        detector_hours: What training the detector and extracting took, for the total of a row.
    """

    rows: tuple[AblationRow, ...]
    cache: Location
    val_cache: Location | None
    out: Path
    seeds: int = 1
    device: str = "cpu"
    engine: Literal["local", "ray"] = "local"
    cluster: Cluster = field(default_factory=Cluster)
    sam: SamSource | None = None
    detector_hours: float | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """One row with one seed: a head to be trained and measured in a folder of its own."""

    plan: RowPlan
    recipe: Recipe
    folder: Path
    identity: dict[str, Any]


def run_ablate(config: AblateConfig, reporter: Reporter) -> tuple[RowResult, ...]:
    """Train and measure every row; what is done already is not done again.

    Rows that go through the cache in the same order learn from one stream of batches.

    Args:
        config: What to do.
        reporter: Who is told about progress.

    Returns:
        One result per row, in order; a row that failed says why.

    Raises:
        CacheError: If a cache is missing, unfinished or damaged.
        IdentityError: If the two caches come from different detectors.
        StoppedError: If a signal ended it; the same command goes on from there.
    """
    if config.seeds < 1:
        raise ConfigError(f"--seeds {config.seeds}: give 1 or more")
    if config.detector_hours is not None and not 0 <= config.detector_hours < math.inf:
        raise ConfigError(f"--detector-hours {config.detector_hours}: give 0 or more hours")
    _require_own_folders(config)
    cache, validation = open_both(config)
    plans = plan_rows(config.rows, cache.spec)
    problems = {p.row.name: p.problem for p in plans if p.problem}
    groups: list[_Group] = []
    for seed in range(config.seeds):
        jobs = [
            _job(config, plan, seed, cache, validation)
            for plan in plans
            if plan.row.name not in problems and seed < _num_seeds(config, plan, cache)
        ]
        waiting = []
        for job in jobs:
            try:
                if _read_result(job) is None:
                    waiting.append(job)
            except HeadError as error:
                problems[job.plan.row.name] = str(error)
        groups += [(seed, tuple(j.plan.row.name for j in g)) for g in _by_stream(waiting)]
    if config.engine == "ray":
        problems |= _on_cluster(config, groups, reporter)
    else:
        for group in groups:
            problems |= _train_group(config, group, reporter)
    for name, problem in problems.items():
        reporter.warn(f"row {name}: {problem}")
    results = [_collect(config, plan, problems, cache, validation) for plan in plans]
    return tuple(_compare(config, results, validation))


def _require_own_folders(config: AblateConfig) -> None:
    """Refuse rows that would write over one another."""
    taken: dict[Path, str] = {}
    for row in config.rows:
        folder = folder_of(config, row, 0)
        if folder in taken:
            raise ConfigError(
                f"rows {taken[folder]!r} and {row.name!r} would share {folder.parent}; give each "
                "once, under a name of its own"
            )
        taken[folder] = row.name


# Rows, by name, that learn from one read of the cache with one seed.
_Group = tuple[int, tuple[str, ...]]


def _train_group(config: AblateConfig, group: _Group, reporter: Reporter) -> dict[str, str]:
    """Train and measure a group; problems by row."""
    seed, names = group
    cache, validation = open_both(config)
    plans = [p for p in plan_rows(config.rows, cache.spec) if p.row.name in names]
    jobs = [_job(config, plan, seed, cache, validation) for plan in plans]
    reporter.say(f"seed {seed}, {len(jobs)} heads over one read: {', '.join(names)}")
    return _train_together(config, jobs, cache, validation, reporter)


def _train_silently(config: AblateConfig, group: _Group) -> dict[str, str]:
    """The same on a worker of a cluster, whose messages nobody sees."""
    return _train_group(config, group, SilentReporter())


def _on_cluster(
    config: AblateConfig, groups: Sequence[_Group], reporter: Reporter
) -> dict[str, str]:
    """Groups as tasks; they are halved until every worker has one."""
    pieces = list(groups)
    while pieces and len(pieces) < config.cluster.workers:
        pieces.sort(key=lambda g: len(g[1]))
        seed, names = pieces.pop()
        if len(names) == 1:
            pieces.append((seed, names))
            break
        pieces += [(seed, tuple(half)) for half in split(names, 2)]
    problems: dict[str, str] = {}
    reporter.start("ablate", sum(len(names) for _, names in pieces), "heads")
    train = functools.partial(_train_silently, config)
    for (_, names), found in on_cluster(train, pieces, config.cluster):
        problems |= found
        reporter.advance(len(names))
    reporter.finish()
    return problems


def seconds_per_step(
    plans: Sequence[RowPlan], cache: FeatureCache, device_name: str
) -> dict[str, float]:
    """How long a training step of each row takes here, measured on the first images of the cache.

    Args:
        plans: Rows.
        cache: A complete cache of the training split.
        device_name: Where they would be trained.

    Returns:
        Seconds by row; rows that cannot be trained are absent.
    """
    found = {}
    for plan in plans:
        recipe = plan.row.recipe
        if plan.problem or plan.row.baseline or _is_training_free(recipe, cache):
            continue
        device = training_device(device_name, recipe.train.amp)
        steps = 1 + _TIMED_STEPS
        train = replace(recipe.train, steps=steps, checkpoint_minutes=1e9)
        learner = build_learner(train, lambda r=recipe: MaskHead(r.head, cache.spec), device)  # type: ignore[misc]
        loop = TrainingLoop(cache, [Run(learner)], device, SilentReporter())
        seconds = []
        for last in range(1, steps + 1):
            started = time.perf_counter()
            loop.run(until=last)
            seconds.append(time.perf_counter() - started)
        found[plan.row.name] = statistics.mean(seconds[1:])
    return found


def open_both(config: AblateConfig) -> tuple[FeatureCache, FeatureCache]:
    """The cache to train from and the one to measure on.

    Args:
        config: The ablation.

    Returns:
        Two complete caches of one detector.

    Raises:
        CacheError: If a cache is missing, unfinished or damaged, or too small to be divided.
        IdentityError: If they come from different detectors.
        ConfigError: If there is nothing to measure on, or rows would be measured on other images.
    """
    cache = FeatureCache.open(config.cache)
    if config.val_cache is None:
        splits = {row.recipe.train.val_split for row in config.rows}
        if len(splits) != 1 or 0 in splits:
            raise ConfigError(
                "give --val-cache, or --val-split N to keep every N-th image of --cache for "
                "measuring"
            )
        cache.require_complete()
        return cache, cache.split(splits.pop())[1]
    validation = FeatureCache.open(config.val_cache)
    require_same(
        detector_identity(cache.spec),
        f"--cache {cache.path}",
        detector_identity(validation.spec),
        f"--val-cache {validation.path}",
    )
    cache.require_complete()
    validation.require_complete()
    return cache, validation


def _job(
    config: AblateConfig,
    plan: RowPlan,
    seed: int,
    cache: FeatureCache,
    validation: FeatureCache,
) -> _Job:
    train = replace(plan.row.recipe.train, seed=seed)
    recipe = replace(plan.row.recipe, train=train)
    identity = {
        "head": to_dict(recipe.head),
        "train": to_dict(train),
        "cache": cache.cache_id,
        "val_cache": validation.cache_id if config.val_cache is not None else "split",
        "baseline": plan.row.baseline,
    }
    return _Job(plan, recipe, folder_of(config, plan.row, seed), identity)


def folder_of(config: AblateConfig, row: AblationRow, seed: int) -> Path:
    """The run folder of a row with one seed.

    Args:
        config: The ablation.
        row: The row.
        seed: The seed.

    Returns:
        Below ``--out``.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")
    return config.out / "rows" / slug / f"seed-{seed}"


def _read_result(job: _Job) -> dict[str, Any] | None:
    path = job.folder / RESULT_FILE
    try:
        done: dict[str, Any] = json.loads(path.read_bytes())
        before = done["identity"]
        for name, kind in (("head", HeadConfig), ("train", TrainConfig)):
            before[name] = completed(kind, before[name])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise HeadError(f"{path} is damaged; remove it to train this row again") from error
    found = [
        d
        for d in differences(before, json.loads(json.dumps(job.identity)))
        if d[0].removeprefix("train.") not in FREE_FIELDS
    ]
    if found:
        key, theirs, ours = found[0]
        raise HeadError(
            f"{path} is of another ablation: {key} was {theirs!r} and is {ours!r} now; give "
            "another --out"
        )
    return done


def _by_stream(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Jobs that can share their batches, together."""
    groups: dict[tuple[object, ...], list[_Job]] = {}
    for job in jobs:
        groups.setdefault(stream_key(job.recipe.train), []).append(job)
    yield from groups.values()


def _run(loop: TrainingLoop) -> None:
    """The loop's own words name ``--resume``, which an ablation does not need."""
    try:
        loop.run()
    except StoppedError as error:
        raise StoppedError("stopped by a signal; the same command goes on from there") from error


def _train_together(
    config: AblateConfig,
    jobs: Sequence[_Job],
    cache: FeatureCache,
    validation: FeatureCache,
    reporter: Reporter,
) -> dict[str, str]:
    """Train and measure some jobs; problems by row."""
    problems: dict[str, str] = {}
    runs: dict[int, Run] = {}
    device = torch_device(config.device)
    for number, job in enumerate(jobs):
        try:
            if not job.plan.row.baseline and not _is_training_free(job.recipe, cache):
                runs[number] = _start(config, job, cache, validation)
        except MfdetrError as error:
            problems[job.plan.row.name] = str(error)
    if runs:
        loop = TrainingLoop(cache, list(runs.values()), device, reporter, split_when_full=True)
        _run(loop)
    for number, job in enumerate(jobs):
        name = job.plan.row.name
        if name in problems:
            continue
        run = runs.get(number)
        if run is not None and run.problem is not None:
            problems[name] = str(run.problem)
            continue
        try:
            if job.plan.row.baseline:
                _measure_baseline(config, job, validation, device, reporter)
            else:
                _measure(job, run, cache, validation, device, reporter)
        except MfdetrError as error:
            problems[name] = str(error)
    return problems


def _start(config: AblateConfig, job: _Job, cache: FeatureCache, validation: FeatureCache) -> Run:
    train = job.recipe.train
    device = training_device(config.device, train.amp)
    learner = build_learner(train, lambda: new_head(job.recipe.head, cache, train), device)
    require_c1(cache, learner.head, train)
    if learner.head.c1 is not None:
        # Not after it was trained.
        validation.require_c1_map("evaluation")
    begun = job.folder.exists() and any(job.folder.iterdir())
    settings = TrainHeadConfig(config.cache, job.folder, job.recipe, resume=begun)
    document = run_document(settings, train, cache, None)
    prepare_folder(job.folder, job.recipe.head, document, resume=begun)
    run = Run(learner, job.folder, RunLog(job.folder))
    run.restore()
    return run


def _measure(
    job: _Job,
    run: Run | None,
    cache: FeatureCache,
    validation: FeatureCache,
    device: torch.device,
    reporter: Reporter,
) -> None:
    """Measure a trained head, or one that needs no training, and write its result."""
    make_folder(job.folder)
    trained = {"train_seconds": 0.0, "images_per_second": 0.0}
    if run is None:
        head = MaskHead(job.recipe.head, cache.spec)
    else:
        save_head(job.folder, run.learner.result_weights())
        head = load_head(job.folder).head
        seconds = run.learner.seconds
        speed = run.learner.images / max(seconds, 1e-9)
        trained = {"train_seconds": seconds, "images_per_second": speed}
    measured, masks = measure(validation, head.to(device), device, reporter)
    head_ms = 1000 * measured.latency["head"].median
    _write_result(job, {**trained, "head_ms": head_ms, "mask": measured.mask.to_dict()}, masks)


def _measure_baseline(
    config: AblateConfig,
    job: _Job,
    validation: FeatureCache,
    device: torch.device,
    reporter: Reporter,
) -> None:
    baseline = job.plan.row.baseline
    assert baseline
    metrics, masks = measure_baseline(validation, baseline, reporter, sam=config.sam, device=device)
    nothing = {"train_seconds": 0.0, "images_per_second": 0.0, "head_ms": 0.0}
    _write_result(job, {**nothing, "mask": metrics.to_dict()}, masks)


def _write_result(job: _Job, result: dict[str, Any], masks: Sequence[Result]) -> None:
    write_atomically(job.folder / MASKS_FILE, gzip.compress(json_results(masks), 1, mtime=0))
    document = {**result, "identity": job.identity}
    write_atomically(job.folder / RESULT_FILE, json.dumps(document, indent=2).encode())


def _num_seeds(config: AblateConfig, plan: RowPlan, cache: FeatureCache) -> int:
    """How often a row is measured: once where nothing is drawn at random."""
    fixed = plan.row.baseline or _is_training_free(plan.row.recipe, cache)
    return 1 if fixed else config.seeds


def _is_training_free(recipe: Recipe, cache: FeatureCache) -> bool:
    with torch.device("meta"):
        return not any(True for _ in MaskHead(recipe.head, cache.spec).parameters())


def _collect(
    config: AblateConfig,
    plan: RowPlan,
    problems: Mapping[str, str],
    cache: FeatureCache,
    validation: FeatureCache,
) -> RowResult:
    if plan.row.name in problems:
        return RowResult(plan, problem=problems[plan.row.name])
    seeds = []
    for seed in range(_num_seeds(config, plan, cache)):
        done = _read_result(_job(config, plan, seed, cache, validation))
        assert done is not None
        seeds.append(done)

    def mean(name: str) -> float:
        return statistics.mean(float(s[name]) for s in seeds)

    trained, before = mean("train_seconds"), config.detector_hours
    return RowResult(
        plan,
        seeds=tuple(CocoMetrics(**s["mask"]) for s in seeds),
        train_seconds=trained,
        images_per_second=mean("images_per_second"),
        head_ms=mean("head_ms"),
        total_hours=None if before is None else before + trained / 3600,
    )


def _compare(
    config: AblateConfig, results: Sequence[RowResult], validation: FeatureCache
) -> Iterator[RowResult]:
    """Add to every row how it differs from the first one that has a result."""
    measured = [r for r in results if r.seeds]
    differences_to_first: dict[str, PairedDifference] = {}
    if len(measured) > 1:
        truth = ground_truth_of(validation)
        curves = []
        for r in measured:
            found = [
                WeightedAP(truth, _masks(folder_of(config, r.plan.row, seed)), "segm")
                for seed in range(len(r.seeds))
            ]
            # A row without chance in it stands beside every seed of the others.
            curves.append(found if len(found) == config.seeds else found * config.seeds)
        compared = compare_all(curves, _BOOTSTRAP_SAMPLES)
        for result, difference in zip(measured[1:], compared[0][1:], strict=True):
            differences_to_first[result.plan.row.name] = difference
    for result in results:
        yield replace(result, against_first=differences_to_first.get(result.plan.row.name))


def _masks(folder: Path) -> list[Result]:
    found: list[Result] = json.loads(gzip.decompress((folder / MASKS_FILE).read_bytes()))
    return found
