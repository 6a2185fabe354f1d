"""The rows that a command compares, from its options."""

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from mfdetr_cache.training.recipes import build_recipe, split_settings
from mfdetr_pipelines.ablation.paper_tables import PublishedSystem, paper_table
from mfdetr_pipelines.ablation.rows import (
    AblationRow,
    baseline_rows,
    label_fraction_rows,
    rows_of_file,
    rows_of_table,
    smaller_rows,
    varied_rows,
    with_settings,
)
from mfdetr_pipelines.config.ablate import RowOptions

_BRANCHES = Path(__file__).with_name("branches.toml")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows to compare.

    Attributes:
        title: Heading of the report.
        rows: The rows; the first is the reference.
        table: The table of the paper, if it is one.
        needs: What the training needs besides a cache; may be empty.
        published: Systems that are shown beside the rows.
    """

    title: str
    rows: tuple[AblationRow, ...]
    table: int | None = None
    needs: str = ""
    published: tuple[PublishedSystem, ...] = ()


def comparison_of(options: RowOptions) -> Comparison:
    """The rows of a file, table, branches or recipes, with the options' additions and replacements.

    ConfigError if a table, recipe, baseline or setting is unknown.
    """
    head, train = split_settings(options.set)
    base = _chosen_rows(options)
    rows = with_settings((*base.rows, *baseline_rows(options.baseline)), head, train)
    rows = varied_rows(rows, options.vary)
    if options.smaller:
        rows = smaller_rows(rows)
    if options.label_fraction:
        rows = label_fraction_rows(rows, options.label_fraction)
    return replace(base, rows=rows)


def _branches() -> Comparison:
    """The mask branches of other papers, between the box as mask and the annotated one in it."""
    rows = (*rows_of_file(_BRANCHES), *baseline_rows(("box", "oracle")))
    entries = tomllib.loads(_BRANCHES.read_text())["published"]
    published = tuple(PublishedSystem(**entry) for entry in entries)
    return Comparison("Mask branches on the same frozen features", rows, published=published)


def _chosen_rows(options: RowOptions) -> Comparison:
    if options.branches:
        return _branches()
    if options.file is not None:
        return Comparison(f"Rows of {options.file.name}", rows_of_file(options.file))
    if options.table is not None:
        table = paper_table(options.table)
        title = f"Table {options.table}: {table.caption}"
        rows = rows_of_table(table)
        return Comparison(title, rows, options.table, table.needs, table.published)
    rows = tuple(AblationRow(name, build_recipe(name, {})) for name in options.recipe)
    return Comparison(f"Recipes: {', '.join(options.recipe)}", rows)
