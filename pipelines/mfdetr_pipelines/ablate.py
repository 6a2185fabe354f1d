"""Ablate: many heads from one cache, each row trained for every seed, one table at the end."""

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.config import to_dict
from mfdetr_cache.devices import torch_device
from mfdetr_cache.errors import ConfigError, HeadError, MfdetrError, StoppedError
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.cost import HeadCost, hdetr_r50_spec, head_cost
from mfdetr_cache.head.folder import load_head, write_atomically
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import detector_identity, differences, require_same
from mfdetr_cache.protocols import Reporter
from mfdetr_cache.types import DetectorSpec
from mfdetr_pipelines.evaluate import measure
from mfdetr_pipelines.paper_tables import PaperRow, PaperTable
from mfdetr_pipelines.recipes import Recipe
from mfdetr_pipelines.run_folder import TrainHeadConfig
from mfdetr_pipelines.train_head import run_train_head

RESULT_FILE = "result.json"


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One row: what is trained, and what the paper says about it.

    Attributes:
        name: What distinguishes it.
        recipe: Head and training.
        paper: The paper's row, where it is one.
        note: What had to be changed to fit the detector; empty if nothing.
    """

    name: str
    recipe: Recipe
    paper: PaperRow | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What a row costs, before anything is trained.

    Attributes:
        row: The row.
        cost: Parameters and multiply-adds; None where the head cannot be built.
        problem: Why it cannot.
    """

    row: AblationRow
    cost: HeadCost | None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values; metrics in [0, 1]."""
        cost, paper = self.cost, self.row.paper
        return {
            "name": self.row.name,
            "params_m": None if cost is None else cost.parameters / 1e6,
            "macs_g": None if cost is None else cost.macs / 1e9,
            "executed_macs_g": None if cost is None else cost.executed_macs / 1e9,
            "paper_params_m": None if paper is None else paper.params_m,
            "paper_macs_g": None if paper is None else paper.macs_g,
            "paper_AP": None if paper is None else paper.metrics.AP,
            "note": self.problem or self.row.note,
        }


@dataclass(frozen=True, slots=True)
class RowResult:
    """What came of a row.

    Attributes:
        plan: Its cost.
        seeds: Mask metrics of each seed that was trained.
        train_seconds: Mean training time of a seed.
        images_per_second: Mean training speed.
        head_ms: Mean time of the mask network per evaluated image, in milliseconds.
        problem: Why it has no result; empty if it has.
    """

    plan: RowPlan
    seeds: tuple[CocoMetrics, ...] = ()
    train_seconds: float = 0.0
    images_per_second: float = 0.0
    head_ms: float = 0.0
    problem: str = ""

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
            "problem": self.problem,
        }


@dataclass(frozen=True, slots=True)
class AblateConfig:
    """What ``mfdetr ablate`` is told.

    Attributes:
        rows: What to compare.
        cache: Cache of the training split.
        val_cache: Cache of the split to measure on.
        out: Where runs and tables go.
        seeds: Seeds 0 to N - 1 of every row.
        max_steps: Steps of every row; None keeps each recipe's own.
        device: Where to train.
    """

    rows: tuple[AblationRow, ...]
    cache: Path
    val_cache: Path
    out: Path
    seeds: int = 1
    max_steps: int | None = None
    device: str = "cpu"


def rows_of_table(table: PaperTable) -> tuple[AblationRow, ...]:
    """The rows of a table of the paper.

    Args:
        table: The table.

    Returns:
        Its rows in order.
    """
    return tuple(AblationRow(r.name, table.recipe(r), r) for r in table.rows)


def with_settings(
    rows: Sequence[AblationRow], head: Mapping[str, Any], train: Mapping[str, Any]
) -> tuple[AblationRow, ...]:
    """Rows with the same settings replaced in all of them.

    Args:
        rows: Rows.
        head: Fields of the architecture.
        train: Fields of the training.

    Returns:
        New rows.
    """
    return tuple(
        replace(
            row,
            recipe=replace(
                row.recipe,
                head=replace(row.recipe.head, **head),
                train=replace(row.recipe.train, **train),
            ),
        )
        for row in rows
    )


def plan_rows(rows: Sequence[AblationRow], spec: DetectorSpec | None = None) -> tuple[RowPlan, ...]:
    """Parameters and multiply-adds of rows.

    Args:
        rows: Rows.
        spec: The detector; None for the paper's H-DETR R50.

    Returns:
        One plan per row.
    """
    plans = []
    for row in rows:
        fitted = row if spec is None else fit_row(row, spec)
        try:
            cost = head_cost(fitted.recipe.head, spec or hdetr_r50_spec())
            plans.append(RowPlan(fitted, cost))
        except HeadError as error:
            plans.append(RowPlan(fitted, None, str(error)))
    return tuple(plans)


def fit_row(row: AblationRow, spec: DetectorSpec) -> AblationRow:
    """A row of the paper for another detector: what its widths force is changed, and noted.

    Args:
        row: A row.
        spec: The detector.

    Returns:
        The row, with a neck where C1 and the encoder differ in width.
    """
    head = row.recipe.head
    c1 = next((m.channels for m in spec.maps if m.role == "c1"), None)
    width = max((m.channels for m in spec.maps if m.role == "encoder"), default=0)
    if head.use_c1 and not head.neck and c1 not in (None, width):
        recipe = replace(row.recipe, head=replace(head, neck=True))
        note = f"neck added: C1 has {c1} channels, the encoder {width}"
        return replace(row, recipe=recipe, note=note)
    return row


def run_ablate(config: AblateConfig, reporter: Reporter) -> tuple[RowResult, ...]:
    """Train and measure every row; what is done already is not done again.

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
    cache, validation = FeatureCache.open(config.cache), FeatureCache.open(config.val_cache)
    require_same(
        detector_identity(cache.spec),
        f"--cache {cache.path}",
        detector_identity(validation.spec),
        f"--val-cache {validation.path}",
    )
    cache.require_complete()
    validation.require_complete()
    results = []
    plans = plan_rows(config.rows, cache.spec)
    for number, plan in enumerate(plans, 1):
        reporter.say(f"row {number} of {len(plans)}: {plan.row.name} {plan.row.note}".rstrip())
        if plan.problem:
            results.append(RowResult(plan, problem=plan.problem))
            continue
        try:
            seeds = list(_seeds(config, plan, cache, validation, reporter))
            results.append(_summarise(plan, seeds))
        except StoppedError:
            raise
        except MfdetrError as error:
            reporter.warn(f"row {plan.row.name} failed: {error}")
            results.append(RowResult(plan, problem=str(error)))
    return tuple(results)


def _seeds(
    config: AblateConfig,
    plan: RowPlan,
    cache: FeatureCache,
    validation: FeatureCache,
    reporter: Reporter,
) -> Iterator[dict[str, Any]]:
    """The result of every seed of a row, from its file or from a new training."""
    slug = re.sub(r"[^a-z0-9]+", "-", plan.row.name.lower()).strip("-")
    for seed in range(config.seeds):
        folder = config.out / "rows" / slug / f"seed-{seed}"
        train = replace(plan.row.recipe.train, seed=seed)
        if config.max_steps is not None:
            train = replace(train, steps=config.max_steps)
        recipe = replace(plan.row.recipe, train=train)
        identity = {
            "head": to_dict(recipe.head),
            "train": to_dict(train),
            "cache": cache.cache_id,
            "val_cache": validation.cache_id,
        }
        done = _read_result(folder / RESULT_FILE, identity)
        if done is None:
            done = _run_seed(folder, recipe, config, cache, validation, reporter)
            done["identity"] = identity
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / RESULT_FILE, json.dumps(done, indent=2).encode())
        yield done


def _read_result(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    try:
        done: dict[str, Any] = json.loads(path.read_bytes())
        before = done["identity"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise HeadError(f"{path} is damaged; remove it to train this row again") from error
    found = differences(before, json.loads(json.dumps(identity)))
    if found:
        key, theirs, ours = found[0]
        raise HeadError(
            f"{path} is of another ablation: {key} was {theirs!r} and is {ours!r} now; give "
            "another --out"
        )
    return done


def _run_seed(
    folder: Path,
    recipe: Recipe,
    config: AblateConfig,
    cache: FeatureCache,
    validation: FeatureCache,
    reporter: Reporter,
) -> dict[str, Any]:
    device = torch_device(config.device)
    trained: dict[str, Any] = {"train_seconds": 0.0, "images_per_second": 0.0}
    if _is_training_free(recipe.head, cache.spec):
        head = MaskHead(recipe.head, cache.spec)
    else:
        summary = run_train_head(
            TrainHeadConfig(
                cache=config.cache,
                out=folder,
                recipe=recipe,
                resume=folder.exists() and any(folder.iterdir()),
                device=config.device,
            ),
            reporter,
        )
        trained = {
            "train_seconds": summary.seconds,
            "images_per_second": summary.images_per_second,
        }
        head = load_head(folder).head
    measured, _ = measure(validation, head.to(device), device, reporter, baselines=False)
    head_ms = 1000 * measured.head_seconds / max(measured.num_images, 1)
    return {**trained, "head_ms": head_ms, "mask": measured.mask.to_dict()}


def _is_training_free(config: HeadConfig, spec: DetectorSpec) -> bool:
    with torch.device("meta"):
        return not any(True for _ in MaskHead(config, spec).parameters())


def _summarise(plan: RowPlan, seeds: Sequence[Mapping[str, Any]]) -> RowResult:
    def mean(name: str) -> float:
        return statistics.mean(float(s[name]) for s in seeds)

    return RowResult(
        plan,
        seeds=tuple(CocoMetrics(**s["mask"]) for s in seeds),
        train_seconds=mean("train_seconds"),
        images_per_second=mean("images_per_second"),
        head_ms=mean("head_ms"),
    )
