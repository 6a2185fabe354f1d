"""The rows that a command compares: of the paper's tables, branches, recipes or a file."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mfdetr_cache.errors import ConfigError
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.recipes import Recipe, build_recipe, split_settings
from mfdetr_pipelines.ablation.rows import (
    AblationRow,
    Printed,
    baseline_rows,
    label_fraction_rows,
    rows_of_file,
    smaller_rows,
    varied_rows,
    with_settings,
)
from mfdetr_pipelines.config.ablate import RowOptions
from mfdetr_pipelines.numbers import number

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class PublishedSystem:
    """What others have published, on the split of the table.

    Attributes:
        AP: Mask AP and its parts, box AP: in percent, as printed; None where they are not.
        epochs: Length of the training of the masks.
        hours: V100 hours of it.
    """

    system: str
    backbone: str
    source: str
    AP: float
    AP50: float | None = None
    AP75: float | None = None
    APS: float | None = None
    APM: float | None = None
    APL: float | None = None
    box_AP: float | None = None
    epochs: float | None = None
    hours: float | None = None

    def cells(self) -> dict[str, str]:
        """As texts by column, a dash for what is not printed."""
        whole = {"epochs": self.epochs, "V100 h": self.hours}
        parts = ("AP", "AP50", "AP75", "APS", "APM", "APL")
        aps = {"box AP": self.box_AP, **{name: getattr(self, name) for name in parts}}
        return {
            "published": self.system,
            "backbone": self.backbone,
            **{name: "-" if n is None else f"{n:g}" for name, n in whole.items()},
            **{name: number(n, 1) for name, n in aps.items()},
            "source": self.source,
        }


def published_table(systems: Iterable[PublishedSystem]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table of systems, the best last."""
    cells = [system.cells() for system in sorted(systems, key=lambda s: s.AP)]
    return list(cells[0]), [list(row.values()) for row in cells]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows to compare; the first is the reference.

    Attributes:
        table: The table of the paper, if it is one.
        needs: What the training needs besides a cache; may be empty.
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


def _chosen_rows(options: RowOptions) -> Comparison:
    if options.branches:
        return _branches()
    if options.file is not None:
        return Comparison(f"Rows of {options.file.name}", rows_of_file(options.file))
    if options.table is not None:
        return paper_table(options.table)
    rows = tuple(AblationRow(name, build_recipe(name, {})) for name in options.recipe)
    return Comparison(f"Recipes: {', '.join(options.recipe)}", rows)


def _branches() -> Comparison:
    """The mask branches of other papers, between the box as mask and the annotated one in it."""
    file = _FOLDER / "branches.toml"
    rows = (*rows_of_file(file), *baseline_rows(("box", "oracle")))
    published = _published(tomllib.loads(file.read_text()))
    return Comparison("Mask branches on the same frozen features", rows, published=published)


def _published(entry: Mapping[str, Any]) -> tuple[PublishedSystem, ...]:
    return tuple(PublishedSystem(**system) for system in entry.get("published", ()))


def paper_table(number: int) -> Comparison:
    """A table of the paper (arXiv 2308.03747); ConfigError if there is no such table."""
    if number not in PAPER_TABLES:
        raise ConfigError(f"--table {number}: the paper has 1 to {max(PAPER_TABLES)}")
    return PAPER_TABLES[number]


def _table(entry: Mapping[str, Any]) -> Comparison:
    rows = tuple(_row({**entry, **row}, entry, row) for row in entry["rows"])
    title = f"Table {entry['number']}: {entry['caption']}"
    return Comparison(title, rows, entry["number"], entry.get("needs", ""), _published(entry))


def _row(both: Mapping[str, Any], *changes: Mapping[str, Any]) -> AblationRow:
    """A row from its entry and its table's defaults; changes of head and training are merged."""
    head, train = HeadConfig(), TrainConfig()
    for change in changes:
        head = replace(head, **change.get("head", {}))
        train = replace(train, **change.get("train", {}))
    printed = {k: both[k] for k in ("params_m", "macs_g", "detector") if k in both}
    if "AP" in both:
        printed["metrics"] = CocoMetrics(*(round(p / 100, 5) for p in both["AP"]))
    return AblationRow(
        both["name"],
        Recipe(both["name"], head, train),
        Printed(**printed),
        epochs=both.get("epochs"),
        own_width=both.get("own_width", False),
        extract=both.get("extract", {}),
        tune=both.get("tune", ""),
    )


_TABLES = tomllib.loads((_FOLDER / "paper_tables.toml").read_text())["table"]
PAPER_TABLES = {entry["number"]: _table(entry) for entry in _TABLES}
