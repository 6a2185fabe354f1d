"""``mfdetr ablate``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from mfdetr_pipelines.recipes import RECIPES, build_recipe, split_settings

from mfdetr_cache.errors import ConfigError
from mfdetr_cli.console import ConsoleReporter, print_facts, print_table, write_json
from mfdetr_cli.options import DeviceOption, JsonOption, parse_assignments


def ablate(
    table: Annotated[
        int | None, typer.Option(help="A table of the paper: 1-6, 9, 10, 12, 13, 15.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help=f"A recipe; may be repeated: {', '.join(RECIPES)}.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Cache of the training split.")] = None,
    val_cache: Annotated[
        Path | None, typer.Option(help="Cache of the split to measure on.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where runs and tables go.")] = Path("ablation"),
    seeds: Annotated[int, typer.Option(help="Train every row with seeds 0 to N - 1.")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="Train every row for N steps.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting in every row."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show rows, parameters and MACs; train nothing.")
    ] = False,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Train and compare many heads from one cache: a table of the paper, or recipes.

    What was trained before is kept: the same command goes on where it stopped. Without --cache, a
    dry run counts for the paper's H-DETR R50.

    Example:
    mfdetr ablate --table 3 --cache train2017.zarr --val-cache val2017.zarr
    --max-steps 2000 --seeds 3 --out ablations/table3
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.ablate import (
        AblateConfig,
        AblationRow,
        plan_rows,
        rows_of_table,
        run_ablate,
        with_settings,
    )
    from mfdetr_pipelines.ablation_report import COLUMNS, report_cells, write_report
    from mfdetr_pipelines.paper_tables import paper_table

    if (table is None) == (not recipe):
        raise ConfigError("give --table N, or --recipe (one or more), and not both")
    needs = ""
    if table is not None:
        chosen = paper_table(table)
        rows, title, needs = rows_of_table(chosen), f"Table {table}: {chosen.caption}", chosen.needs
    else:
        rows = tuple(AblationRow(name, build_recipe(name, {})) for name in recipe or [])
        title = "Recipes: " + ", ".join(recipe or [])
    head, train = split_settings(parse_assignments(set_ or []))
    rows = with_settings(rows, head, train)
    if dry_run:
        spec = None
        if cache is not None:
            from mfdetr_cache.cache.reader import FeatureCache

            spec = FeatureCache.open(cache).spec
        plans = [p.to_dict() for p in plan_rows(rows, spec)]
        _print_plan(title, plans)
        write_json(json, {"table": table, "title": title, "needs": needs, "rows": plans})
        return
    if needs:
        raise ConfigError(f"--table {table} needs {needs}")
    if cache is None or val_cache is None:
        raise ConfigError("ablate trains from --cache and measures on --val-cache; give both")
    config = AblateConfig(rows, cache, val_cache, out, seeds, max_steps, device)
    results = run_ablate(config, ConsoleReporter())
    files = write_report(out, title, results)
    shown = [c[:9] + c[12:13] for c in map(report_cells, results)]
    print_table(f"{title}, mask AP in percent", [*COLUMNS[:9], COLUMNS[12]], shown)
    for result in results:
        if result.problem:
            typer.echo(f"{result.plan.row.name}: {result.problem}")
    print_facts("Written", {p.suffix[1:]: str(p) for p in files})
    write_json(json, {"table": table, "title": title, "rows": [r.to_dict() for r in results]})


def _print_plan(title: str, plans: list[dict[str, Any]]) -> None:
    def text(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
        return "-" if value is None else f"{scale * value:.{digits}f}"

    def pair(plan: dict[str, Any], ours: str, paper: str) -> str:
        return f"{text(plan[ours])} / {text(plan[paper])}"

    rows = [
        [
            plan["name"],
            pair(plan, "params_m", "paper_params_m"),
            pair(plan, "macs_g", "paper_macs_g"),
            text(plan["executed_macs_g"]),
            text(plan["paper_AP"], 1, 100),
        ]
        for plan in plans
    ]
    columns = ["row", "M params", "G MACs", "done", "AP"]
    print_table(f"{title} (ours / paper)", columns, rows)
    for plan in plans:
        if plan["note"]:
            typer.echo(f"{plan['name']}: {plan['note']}")
