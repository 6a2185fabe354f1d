"""What the rows of an ablation cost before anything is trained, fitted to the detector."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import HeadError
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.cost import HeadCost, hdetr_r50_spec, head_cost
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.learner import build_learner
from mfdetr_cache.training.loop import Run, TrainingLoop
from mfdetr_cache.types import DetectorSpec
from mfdetr_pipelines.ablation.rows import AblationRow
from mfdetr_pipelines.train_head import training_device

# Steps that are timed for a dry run, after one that is not.
_TIMED_STEPS = 2


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

    @property
    def is_trained(self) -> bool:
        """Whether it has weights to train, which depend on the seed."""
        return self.cost is not None and self.cost.parameters > 0

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
        if row.baseline:
            plans.append(RowPlan(row, None))
            continue
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


def shared_notes(named: Sequence[tuple[str, str]]) -> list[str]:
    """Notes as lines, each one once.

    Args:
        named: Name and note of every row; a note may be empty.

    Returns:
        Lines that name the rows they are about.
    """
    rows_of: dict[str, list[str]] = {}
    for name, note in named:
        if note:
            rows_of.setdefault(note, []).append(name)
    return [
        f"{'all rows' if 1 < len(rows) == len(named) else ', '.join(rows)}: {note}"
        for note, rows in rows_of.items()
    ]


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
        if not plan.is_trained:
            continue
        device = training_device(device_name, recipe.train.amp)
        steps = 1 + _TIMED_STEPS
        train = replace(recipe.train, steps=steps, checkpoint_minutes=1e9)
        learner = build_learner(train, lambda r=recipe: build_head(r.head, cache.spec), device)  # type: ignore[misc]
        loop = TrainingLoop(cache, [Run(learner)], device, SilentReporter())
        seconds = []
        for last in range(1, steps + 1):
            started = time.perf_counter()
            loop.run(until=last)
            seconds.append(time.perf_counter() - started)
        found[plan.row.name] = statistics.mean(seconds[1:])
    return found
