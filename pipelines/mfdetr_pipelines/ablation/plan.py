"""Costs of the rows of an ablation before training, fitted to the detector."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import ConfigError, HeadError
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.cost import MEAN_COCO_INPUT_HW, HeadCost, head_cost, paper_detector
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.input.loader import CacheSource
from mfdetr_cache.training.learner import build_learner
from mfdetr_cache.training.loop import TrainingLoop
from mfdetr_cache.training.order import chosen_views, steps_per_epoch, trainable_rows
from mfdetr_cache.training.run import Run
from mfdetr_cache.training.settings import training_device
from mfdetr_cache.types import DetectorSpec
from mfdetr_pipelines.ablation.caches import RowCaches
from mfdetr_pipelines.ablation.rows import AblationRow

# Steps that are timed for a dry run, after one that is not.
_TIMED_STEPS = 2
# Images of COCO train2017 with an object.
_COCO_IMAGES = 117_266
# Multiply-adds are counted for this size everywhere, and columns say so.
MACS_SIZE = "{}x{}".format(*MEAN_COCO_INPUT_HW)


def plan_of(row: AblationRow) -> dict[str, Any]:
    """A planned row as plain values; metrics in [0, 1]."""
    cost, paper, train = row.cost, row.paper, row.recipe.train
    return {
        "name": row.name,
        "steps": train.steps if row.is_trained else None,
        "batch_size": train.batch_size if row.is_trained else None,
        "epochs": row.passes,
        "macs_input_hw": MEAN_COCO_INPUT_HW,
        "params_m": None if cost is None else cost.parameters / 1e6,
        "macs_g": None if cost is None else cost.macs / 1e9,
        "executed_macs_g": None if cost is None else cost.executed_macs / 1e9,
        "paper_params_m": paper.params_m,
        "paper_macs_g": paper.macs_g,
        "paper_AP": paper.AP,
        "extract": dict(row.extract),
        "tune": row.tune,
        "note": row.problem or row.note,
    }


def plan_rows(
    rows: Sequence[AblationRow], cache: FeatureCache | None = None, max_steps: int | None = None
) -> tuple[AblationRow, ...]:
    """Rows fitted to the detector of a cache, with their cost; one that cannot be has a problem.

    Rows in epochs show every image equally often, whatever their batch size. ``max_steps`` shortens
    all rows by the factor that leaves so many steps to the longest; ConfigError if it is below 1.
    Without a cache, rows are counted for COCO train2017 and the paper's detector.
    """
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"--max-steps must be 1 or more, not {max_steps}")
    count = _epoch_sizes(cache)
    costs: dict[tuple[str, HeadConfig], HeadCost] = {}
    plans = []
    for row in _with_lengths(rows, count, max_steps):
        if row.baseline or row.problem:
            plans.append(row)
            continue
        try:
            if cache is None:
                spec, fitted = paper_detector(row.paper.detector), row
            else:
                chosen_views(cache.layout.views, row.recipe.train.views)
                spec, fitted = cache.spec, fit_row(row, cache.spec)
            # Many rows differ in their training alone.
            key = (spec.name, fitted.recipe.head)
            if key not in costs:
                costs[key] = head_cost(fitted.recipe.head, spec)
        except (ConfigError, HeadError) as error:
            plans.append(replace(row, problem=str(error)))
            continue
        train = fitted.recipe.train
        passes = train.steps / steps_per_epoch(count(train), train.batch_size)
        fitted = replace(fitted, cost=costs[key])
        plans.append(replace(fitted, passes=passes if fitted.is_trained else None))
    return tuple(plans)


def plan_with_caches(
    rows: Sequence[AblationRow], found: RowCaches, max_steps: int | None
) -> tuple[AblationRow, ...]:
    """Rows as :func:`plan_rows`, each fitted to its own cache; one that has none has a problem."""
    plans: dict[str, AblationRow] = {}
    for cache in {id(c.training): c.training for c in found.by_row.values()}.values():
        ours = [
            r for r in rows if r.name in found.by_row and found.by_row[r.name].training is cache
        ]
        plans |= {p.name: p for p in plan_rows(ours, cache, max_steps)}
    return tuple(
        plans.get(r.name) or replace(r, problem=found.problems.get(r.name, "")) for r in rows
    )


def fit_row(row: AblationRow, spec: DetectorSpec) -> AblationRow:
    """A row of the paper with the widths of another detector, and a note of what changed.

    It gets the detector's width where it asks for that, and a neck where C1 and the encoder differ
    in width. HeadError if a training-free row would need weights with this detector.
    """
    head, notes = row.recipe.head, []
    c1 = next((m.channels for m in spec.maps if m.role == "c1"), None)
    width = max((m.channels for m in spec.maps if m.role == "encoder"), default=0)
    untrained = row.own_width and _has_no_part_to_train(head)
    if row.own_width and width and head.hidden_dim != width:
        head = replace(head, hidden_dim=width)
        notes.append(f"d={width}, the detector's own width")
    if untrained and head.use_c1 and c1 not in (None, width):
        raise HeadError(
            f"there is nothing to train in this row, but C1 has {c1} channels and the encoder "
            f"{width}: adding them takes a neck"
        )
    if untrained and spec.query_dim != width:
        raise HeadError(
            f"there is nothing to train in this row, but queries have {spec.query_dim} channels "
            f"and the encoder {width}: comparing them takes a mapper"
        )
    if untrained and any(m.role == "backbone" for m in spec.maps):
        # Backbone levels need a projection, and without an image encoder nothing reads them.
        head = replace(head, use_backbone_levels=False)
    if head.use_c1 and not head.neck and c1 not in (None, width):
        head = replace(head, neck=True)
        notes.append(f"neck added: C1 has {c1} channels, the encoder {width}")
    return replace(row, recipe=replace(row.recipe, head=head), note="; ".join(notes))


def _has_no_part_to_train(head: HeadConfig) -> bool:
    parts = (
        head.image_layers, head.box_layers, head.query_ffn, head.query_o2o, head.query_b2o,
        head.mask_scoring, head.neck and head.use_c1, head.mask_predictor != "dot",
    )  # fmt: skip
    return not any(parts)


def _epoch_sizes(cache: FeatureCache | None) -> Callable[[TrainConfig], int]:
    """Images per epoch, counted once for all rows that learn from the same ones."""

    @functools.cache
    def count(**chosen: Any) -> int:  # noqa: ANN401
        train = TrainConfig(**chosen)
        if cache is None:
            return max(1, round(train.label_fraction * _COCO_IMAGES))
        return len(trainable_rows(cache, train))

    names = ("label_fraction", "held_out", "val_split")
    return lambda train: count(**{name: getattr(train, name) for name in names})


def _with_lengths(
    rows: Sequence[AblationRow], count: Callable[[TrainConfig], int], max_steps: int | None
) -> list[AblationRow]:
    in_epochs = {
        row.name: row.epochs * steps_per_epoch(count(row.recipe.train), row.recipe.train.batch_size)
        for row in rows
        if row.epochs is not None
    }
    share = 1 if max_steps is None else max_steps / max(in_epochs.values(), default=1)
    settled = []
    for row in rows:
        steps = max_steps or row.recipe.train.steps
        if row.name in in_epochs:
            steps = max(1, round(share * in_epochs[row.name]))
        settled.append(row.changed(train={"steps": steps}))
    return settled


def shared_notes(named: Sequence[tuple[str, str]]) -> list[str]:
    """Non-empty notes without duplicates, each after the names of its rows."""
    rows_of: dict[str, list[str]] = {}
    for name, note in named:
        if note:
            rows_of.setdefault(note, []).append(name)
    return [
        f"{'all rows' if 1 < len(rows) == len(named) else ', '.join(rows)}: {note}"
        for note, rows in rows_of.items()
    ]


def seconds_per_step(
    rows: Sequence[AblationRow], cache: FeatureCache, device_name: str
) -> dict[str, float]:
    """Measured seconds per training step from a complete cache, by row, on its first images."""
    found = {}
    for row in rows:
        recipe = row.recipe
        if not row.is_trained or row.tune:
            continue
        device = training_device(device_name, recipe.train.amp)
        steps = 1 + _TIMED_STEPS
        train = replace(recipe.train, steps=steps, checkpoint_minutes=1e9)
        learner = build_learner(train, lambda r=recipe: build_head(r.head, cache.spec), device)  # type: ignore[misc]
        loop = TrainingLoop(CacheSource(cache, [learner]), [Run(learner)], SilentReporter())
        seconds = []
        for last in range(1, steps + 1):
            started = time.perf_counter()
            loop.run(until=last)
            seconds.append(time.perf_counter() - started)
        found[row.name] = statistics.mean(seconds[1:])
    return found
