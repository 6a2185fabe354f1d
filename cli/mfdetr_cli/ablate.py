"""``mfdetr ablate``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from mfdetr_pipelines.config.shared import WorkOptions, parse_assignments

from mfdetr_cache.errors import ConfigError
from mfdetr_cache.training.recipes import RECIPES, build_recipe, split_settings
from mfdetr_cli.console import ConsoleReporter, print_facts, print_lines, print_table, write_json
from mfdetr_cli.options import (
    DeviceOption,
    JsonOption,
    LocalCacheOption,
    LocalCacheSizeOption,
    storage_at,
)

if TYPE_CHECKING:
    from mfdetr_pipelines.ablation.result import RowResult
    from mfdetr_pipelines.ablation.rows import AblationRow

    from mfdetr_cache.choices import Baseline


def ablate(
    file: Annotated[
        Path | None,
        typer.Argument(help="Rows in TOML: [[row]] tables with name, recipe and set."),
    ] = None,
    table: Annotated[
        int | None,
        typer.Option(help="A table of the paper: 1-6, 9, 10, 12, 13, 15; others as a dry run."),
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help=f"A recipe; may be repeated: {', '.join(RECIPES)}.")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="Cache of the training split.")] = None,
    val_cache: Annotated[str | None, typer.Option(help="Cache of the split to measure on.")] = None,
    val_split: Annotated[
        int | None,
        typer.Option(
            help="Without --val-cache: leave every N-th image of --cache out of training and "
            "measure on these, to choose settings."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where runs and tables go.")] = Path("ablation"),
    seeds: Annotated[int, typer.Option(help="Train every row with seeds 0 to N - 1.")] = 1,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="A row without a head: box, ellipse, oracle or sam; repeatable."),
    ] = None,
    sam_weights: Annotated[
        str | None, typer.Option(help="SAM, SAM 2 or HQ-SAM of transformers, for --baseline sam.")
    ] = None,
    label_fraction: Annotated[
        list[float] | None,
        typer.Option(help="Train every row on the masks of this part of the images; repeatable."),
    ] = None,
    smaller: Annotated[
        bool,
        typer.Option(
            "--smaller", help="Add to every row hidden widths of 32, 16 and 8, and RoI 8 x 8."
        ),
    ] = False,
    detector_hours: Annotated[
        float | None,
        typer.Option(help="Hours of the detector's training and the extraction, for a total."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the validation images, for sample masks.")
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Train every row for N steps; of rows in epochs (Tables 10, 13) the longest."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting in every row."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show rows, parameters and MACs; train nothing.")
    ] = False,
    local_cache: LocalCacheOption = None,
    local_cache_size: LocalCacheSizeOption = "100GB",
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Here, or as tasks on a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, such as auto or ray://host:10001.")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Ray tasks at a time; 0 for one per GPU, or per two CPUs.")
    ] = 0,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Train and compare many heads from one cache: a table of the paper, or recipes.

    Rows that go through the cache in the same order learn from one read of it. What was trained
    before is kept: the same command goes on where it stopped. Without --cache, a dry run counts for
    the paper's H-DETR R50; with it, a step of every row is timed.

    Example:
    mfdetr ablate --table 3 --cache train2017.zarr --val-cache val2017.zarr
    --max-steps 2000 --seeds 3 --out ablations/table3
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.ablation.baselines import SamSource
    from mfdetr_pipelines.ablation.report import write_report
    from mfdetr_pipelines.ablation.rows import (
        baseline_rows,
        label_fraction_rows,
        smaller_rows,
        with_settings,
    )
    from mfdetr_pipelines.ablation.run import AblateConfig, run_ablate
    from mfdetr_pipelines.ablation.samples import sample_masks

    title, needs, rows = _rows(file, table, recipe or [])
    rows = (*rows, *baseline_rows(_baselines(baseline or [])))
    head, train = split_settings(parse_assignments(set_ or []))
    if val_split is not None:
        train["val_split"] = val_split
    rows = with_settings(rows, head, train)
    if smaller:
        rows = smaller_rows(rows)
    if label_fraction:
        rows = label_fraction_rows(rows, label_fraction)
    if dry_run:
        plans = _plan(rows, cache, seeds, device, max_steps)
        _print_plan(title, plans)
        if needs:
            print_lines(f"It needs {needs}")
        write_json(json, {"table": table, "title": title, "needs": needs, "rows": plans})
        return
    if needs:
        raise ConfigError(f"--table {table} needs {needs}")
    if cache is None or (val_cache is None) == (val_split is None):
        raise ConfigError(
            "ablate trains from --cache and measures on --val-cache, or on the images that "
            "--val-split keeps; give two of the three"
        )
    training = storage_at(cache, local_cache, local_cache_size)
    measured = None
    if val_cache is not None:
        measured = storage_at(val_cache, local_cache, local_cache_size)
    sam = SamSource(sam_weights, images) if sam_weights and images else None
    work = WorkOptions(None, engine, address, workers)
    config = AblateConfig(
        rows, training, measured, out, seeds, device, work, sam, detector_hours, max_steps
    )
    results = run_ablate(config, ConsoleReporter())
    samples = [] if images is None else sample_masks(config, results, images)
    files = write_report(out, title, results, samples)
    _print_results(title, results)
    print_facts("Written", {p.suffix[1:]: str(p) for p in files})
    write_json(json, {"table": table, "title": title, "rows": [r.to_dict() for r in results]})


def _print_results(title: str, results: "Sequence[RowResult]") -> None:
    """Three tables, since eighty columns do not hold one; what no row has is left out."""
    from mfdetr_pipelines.ablation.plan import MACS_SIZE
    from mfdetr_pipelines.ablation.report import COLUMNS, report_cells

    cells = [dict(zip(COLUMNS, report_cells(r), strict=True)) for r in results]
    for title_, wanted in (
        (f"{title}, mask AP in percent", ("AP", "vs first", "AP50", "AP75", "paper AP")),
        ("By size of the object", ("APS", "APM", "APL")),
        (
            "What each costs",
            ("params M", f"MACs G, {MACS_SIZE}", "train min", "images/s", "head ms", "total h"),
        ),
    ):
        names = [n for n in wanted if any(c[n] != "-" for c in cells)]
        lines = [[c["row"], *(c[n] for n in names)] for c in cells]
        print_table(title_, ["row", *names], lines)
    for result in results:
        if result.problem:
            print_lines(f"{result.plan.row.name}: {result.problem}")


def _baselines(names: list[str]) -> "list[Baseline]":
    """The baselines asked for, checked."""
    from mfdetr_pipelines.ablation.rows import BASELINES

    for name in names:
        if name not in BASELINES:
            raise ConfigError(f"--baseline {name}: unknown; use {', '.join(BASELINES)}")
    return names  # type: ignore[return-value]


def _rows(
    file: Path | None, table: int | None, recipes: list[str]
) -> "tuple[str, str, tuple[AblationRow, ...]]":
    """Title, what else is needed, and rows."""
    from mfdetr_pipelines.ablation.paper_tables import paper_table
    from mfdetr_pipelines.ablation.rows import AblationRow, rows_of_file, rows_of_table

    if sum((file is not None, table is not None, bool(recipes))) != 1:
        raise ConfigError("give FILE, or --table N, or --recipe (one or more): one of the three")
    if file is not None:
        return f"Rows of {file.name}", "", rows_of_file(file)
    if table is not None:
        chosen = paper_table(table)
        return f"Table {table}: {chosen.caption}", chosen.needs, rows_of_table(chosen)
    made = tuple(AblationRow(name, build_recipe(name, {})) for name in recipes)
    return "Recipes: " + ", ".join(recipes), "", made


def _plan(
    rows: "tuple[AblationRow, ...]",
    cache: str | None,
    seeds: int,
    device: str,
    max_steps: int | None,
) -> list[dict[str, Any]]:
    """What the rows cost; with a cache, a step of each is timed."""
    from mfdetr_pipelines.ablation.plan import plan_rows, seconds_per_step

    opened = None
    if cache is not None:
        from mfdetr_cache.cache.reader import FeatureCache

        opened = FeatureCache.open(cache)
        opened.require_complete()
    plans = plan_rows(rows, opened, max_steps)
    seconds = {} if opened is None else seconds_per_step(plans, opened, device)
    shown = []
    for plan in plans:
        each = seconds.get(plan.row.name)
        total = None if each is None else each * plan.row.recipe.train.steps * seeds
        shown.append({**plan.to_dict(), "seconds": total})
    return shown


def _print_plan(title: str, plans: list[dict[str, Any]]) -> None:
    """Two tables, since eighty columns do not hold one."""
    from mfdetr_pipelines.ablation.plan import MACS_SIZE, shared_notes

    def text(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
        return "-" if value is None else f"{scale * value:.{digits}f}"

    def pair(plan: dict[str, Any], ours: str, paper: str) -> str:
        return f"{text(plan[ours])} / {text(plan[paper])}"

    cost = [
        [
            plan["name"],
            pair(plan, "params_m", "paper_params_m"),
            pair(plan, "macs_g", "paper_macs_g"),
            text(plan["executed_macs_g"]),
            text(plan["paper_AP"], 1, 100),
        ]
        for plan in plans
    ]
    columns = ["row", "M params", f"G MACs, {MACS_SIZE}", "done", "AP"]
    print_table(f"{title} (ours / paper)", columns, cost)
    timed = any(plan["seconds"] is not None for plan in plans)
    training = [
        [
            plan["name"],
            text(plan["steps"], 0),
            text(plan["batch_size"], 0),
            text(plan["epochs"]),
            *([text(plan["seconds"], 1, 1 / 60)] if timed else []),
        ]
        for plan in plans
    ]
    columns = ["row", "steps", "images per step", "epochs", *(["minutes"] if timed else [])]
    print_table("Training", columns, training)
    for line in shared_notes([(p["name"], p["note"]) for p in plans]):
        print_lines(line)
