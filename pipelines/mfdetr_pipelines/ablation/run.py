"""Ablate: train and measure many heads, rows times seeds, over one read of a cache."""

import functools
from collections.abc import Mapping, Sequence

from mfdetr_cache.errors import SAME_COMMAND, ConfigError, StoppedError
from mfdetr_cache.evaluation.measure import ground_truth_of
from mfdetr_cache.reporter import Reporter, SilentReporter
from mfdetr_cache.training.distributed import split
from mfdetr_cache.training.run_folder import owned_folder
from mfdetr_pipelines.ablation.caches import Caches, find_caches, noting, open_caches
from mfdetr_pipelines.ablation.job import Job, by_stream, plan_jobs, require_own_folders
from mfdetr_pipelines.ablation.plan import plan_with_caches
from mfdetr_pipelines.ablation.result import RowResult, collect, compared_with_first
from mfdetr_pipelines.ablation.training import train_group
from mfdetr_pipelines.config.ablate import AblateConfig
from mfdetr_pipelines.process_engine import run_tasks


def run_ablate(config: AblateConfig, reporter: Reporter) -> tuple[RowResult, ...]:
    """Train and measure every row; finished jobs are not repeated, and a failed row has a problem.

    Rows with the same cache and order of images share one stream of batches; rows that tune the
    detector train alone. Raises CacheError, IdentityError (caches of different detectors) or
    StoppedError (stopped by a signal; the same command resumes).
    """
    if config.comparison.needs:
        raise ConfigError(f"--table {config.comparison.table} needs {config.comparison.needs}")
    require_own_folders(config.rows, config.out)
    with owned_folder(config.out):
        try:
            return _run(config, reporter)
        except StoppedError as error:
            # What stopped says how to resume it alone.
            raise StoppedError(SAME_COMMAND) from error


def _run(config: AblateConfig, reporter: Reporter) -> tuple[RowResult, ...]:
    found = open_caches(config, reporter)
    caches = found.by_row
    rows = plan_with_caches(config.rows, found, config.max_steps)
    jobs = plan_jobs(rows, config.seeds, config.out, caches)
    waiting, problems = _waiting(jobs)
    problems |= {row.name: row.problem for row in rows if row.problem}
    groups = list(by_stream([j for j in waiting if j.name not in problems]))
    if config.work.engine == "ray" or config.work.workers > 1:
        problems |= _train_in_tasks(config, groups, reporter)
    else:
        problems |= _train_here(config, groups, caches, reporter)
    for name, problem in problems.items():
        reporter.warn(f"row {name}: {problem}")
    results = [
        collect(
            row,
            [j for j in jobs if j.name == row.name],
            problems.get(row.name, ""),
            config.detector_hours,
        )
        for row in rows
    ]
    if not caches:
        return tuple(results)
    first = next(iter(caches.values())).validation
    return compared_with_first(results, jobs, ground_truth_of(first))


def _waiting(jobs: Sequence[Job]) -> tuple[list[Job], dict[str, str]]:
    """Jobs without a result, and problems of rows whose stored results cannot be used."""
    waiting: list[Job] = []
    problems: dict[str, str] = {}
    for job in jobs:
        with noting(problems, job.name):
            if job.read_result() is None:
                waiting.append(job)
    return waiting, problems


def _train_here(
    config: AblateConfig,
    groups: Sequence[Sequence[Job]],
    caches: Mapping[str, Caches],
    reporter: Reporter,
) -> dict[str, str]:
    problems: dict[str, str] = {}
    for group in groups:
        names, seed = ", ".join(j.name for j in group), group[0].row.recipe.train.seed
        what = "with the detector" if group[0].row.tune else f"{len(group)} heads over one read"
        reporter.say(f"seed {seed}, {what}: {names}")
        problems |= train_group(group, caches[group[0].name], config, reporter)
    return problems


def _train_in_tasks(
    config: AblateConfig, groups: Sequence[Sequence[Job]], reporter: Reporter
) -> dict[str, str]:
    """Train groups as tasks, the largest split until every worker has one; problems by row."""
    tasks = list(groups)
    while tasks and len(tasks) < config.work.workers:
        tasks.sort(key=len)
        if len(tasks[-1]) == 1:
            break
        tasks += split(tasks.pop(), 2)
    problems: dict[str, str] = {}
    train = functools.partial(_train_there, config)
    reporter.start("ablate", sum(map(len, tasks)), "heads")
    for group, found in run_tasks(train, tasks, config.work, config.work.workers):
        problems |= found
        reporter.advance(len(group))
    reporter.finish()
    return problems


def _train_there(config: AblateConfig, group: Sequence[Job]) -> dict[str, str]:
    """Train a group on a worker, which opens the caches itself and reports no progress."""
    caches = find_caches(config).by_row[group[0].name]
    return train_group(group, caches, config, SilentReporter())
