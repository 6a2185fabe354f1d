from collections.abc import Sequence
from typing import Any

from mfdetr_pipelines.ablation.caches import MissingCache, find_caches, wanted_caches
from mfdetr_pipelines.ablation.comparison import PublishedSystem, published_table
from mfdetr_pipelines.ablation.plan import (
    MACS_SIZE,
    plan_of,
    plan_rows,
    seconds_per_step,
    shared_notes,
)
from mfdetr_pipelines.ablation.report import report_cells, require_report_place, write_report
from mfdetr_pipelines.ablation.result import RowResult
from mfdetr_pipelines.ablation.run import run_ablate
from mfdetr_pipelines.ablation.samples import sample_masks
from mfdetr_pipelines.config.ablate import AblateConfig
from mfdetr_pipelines.numbers import number, percent

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import MfdetrError
from mfdetr_cli.console import human_bytes, print_facts, print_lines, print_table
from mfdetr_cli.output import CommandOutput


def ablate(config: AblateConfig, out: CommandOutput) -> None:
    """Train and compare, or show what it would cost."""
    chosen = config.comparison
    about = {"table": chosen.table, "title": chosen.title}
    if config.dry_run:
        plans, missing = _plan(config)
        wanted = [
            {"cache": str(c.path), "settings": c.settings, "bytes": c.num_bytes} for c in missing
        ]
        out.write_json({**about, "needs": chosen.needs, "rows": plans, "extract": wanted})
        _print_plan(chosen.title, plans)
        _print_published(chosen.published)
        if missing:
            size = human_bytes(sum(cache.num_bytes for cache in missing))
            print_lines(f"--extract would make {len(missing)} caches, about {size} together:")
            print_lines(*(cache.text for cache in missing))
        if chosen.needs:
            print_lines(f"It needs {chosen.needs}")
        return
    require_report_place(config.out)
    results = run_ablate(config, out.reporter)
    out.write_json({**about, "rows": [r.to_dict() for r in results]})
    samples = []
    if config.images is not None:
        caches = find_caches(config).by_row
        samples = sample_masks(caches, results, config.out, config.images)
    files = write_report(config.out, chosen.title, results, samples, chosen.published)
    _print_results(chosen.title, results)
    _print_published(chosen.published)
    print_facts("Written", {p.suffix[1:]: str(p) for p in files})
    if all(result.problem for result in results):
        raise MfdetrError("no row could be trained and measured; each says why above")


def _print_results(title: str, results: Sequence[RowResult]) -> None:
    """Three tables, since eighty columns do not hold one; what no row has is left out."""
    cells = [report_cells(r) for r in results]
    for title_, wanted in (
        (f"{title}, mask AP in percent", ("AP", "vs first", "AP50", "AP75", "paper AP")),
        (
            "By size of the object, at the edge, and of the boxes",
            ("APS", "APM", "APL", "boundary AP", "box AP"),
        ),
        (
            "What each costs",
            ("params M", f"MACs G, {MACS_SIZE}", "train min", "images/s", "head ms", "total h"),
        ),
    ):
        names = [n for n in wanted if any(c[n] != "-" for c in cells)]
        lines = [[c["row"], *(c[n] for n in names)] for c in cells]
        if names:
            print_table(title_, ["row", *names], lines)
    for result in results:
        if result.problem:
            print_lines(f"{result.row.name}: {result.problem}")


def _print_published(published: Sequence[PublishedSystem]) -> None:
    if published:
        print_table("Published, not measured here", *published_table(published))


def _plan(config: AblateConfig) -> tuple[list[dict[str, Any]], list[MissingCache]]:
    """What the rows cost, with a cache a step of each timed; and what is to be extracted."""
    missing: list[MissingCache] = []
    seconds: dict[str, float] = {}
    if not config.cache:
        rows = plan_rows(config.rows, None, config.max_steps)
    else:
        opened = FeatureCache.open(config.local_cache.before(config.cache[0]))
        opened.require_complete()
        # The others are like it: a step takes as long.
        rows = plan_rows(config.rows, opened, config.max_steps)
        seconds = seconds_per_step(rows, opened, config.device)
        if any(row.extract or row.cache for row in config.rows):
            missing = list(wanted_caches(find_caches(config)).values())
    shown = []
    for row in rows:
        each = seconds.get(row.name)
        total = None if each is None else each * row.recipe.train.steps * config.seeds
        shown.append({**plan_of(row), "seconds": total})
    return shown, missing


def _print_plan(title: str, plans: list[dict[str, Any]]) -> None:
    """Two tables, since eighty columns do not hold one."""
    cost = [
        [
            plan["name"],
            f"{number(plan['params_m'])} / {number(plan['paper_params_m'])}",
            f"{number(plan['macs_g'])} / {number(plan['paper_macs_g'])}",
            number(plan["executed_macs_g"]),
            percent(plan["paper_AP"]),
        ]
        for plan in plans
    ]
    columns = ["row", "M params", f"G MACs, {MACS_SIZE}", "done", "AP"]
    print_table(f"{title} (ours / paper)", columns, cost)
    timed = any(plan["seconds"] is not None for plan in plans)
    training = [
        [
            plan["name"],
            number(plan["steps"], 0),
            number(plan["batch_size"], 0),
            number(plan["epochs"]),
            *([number(plan["seconds"] and plan["seconds"] / 60, 1)] if timed else []),
        ]
        for plan in plans
    ]
    columns = ["row", "steps", "images per step", "epochs", *(["minutes"] if timed else [])]
    print_table("Training", columns, training)
    print_lines(*shared_notes([(p["name"], p["note"]) for p in plans]))
    for plan in plans:
        own = [f"--{key.replace('_', '-')} {value}" for key, value in plan["extract"].items()]
        if own:
            print_lines(f"{plan['name']}: from a cache extracted with {' '.join(own)}")
        if plan["tune"]:
            print_lines(f"{plan['name']}: as train-joint --tune {plan['tune']} trains it")
