"""The paper's tables (arXiv 2308.03747) as configurations, read from ``paper_tables.toml``."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from mfdetr_cache.config import nearest
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.recipes import Recipe

# Tables that are not in the file, and why.
_NOT_RUN = {
    7: "comparison of systems, nothing to run",
    8: "comparison of systems, nothing to run",
    16: "it trains the detector too and needs no cache: mfdetr train-joint --tune nothing, "
    "encoder-decoder or all",
}


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One row of a table.

    Attributes:
        name: What distinguishes it.
        recipe: Its head and training.
        params_m: Printed parameters in millions; None where the table has no such column.
        macs_g: Printed "FLOPs" in 10^9, which are multiply-adds.
        metrics: Printed mask AP in [0, 1].
    """

    name: str
    recipe: Recipe
    params_m: float | None
    macs_g: float | None
    metrics: CocoMetrics


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        number: Its number.
        caption: What it studies.
        rows: Its rows in the order of the paper.
        needs: What it needs beyond one cache; empty where one cache serves all rows.
    """

    number: int
    caption: str
    rows: tuple[PaperRow, ...]
    needs: str = ""


def paper_table(number: int) -> PaperTable:
    """A table by its number.

    Args:
        number: As the paper counts.

    Returns:
        The table.

    Raises:
        ConfigError: If the table is none that can be run.
    """
    if number not in PAPER_TABLES:
        hint = f" ({_NOT_RUN[number]})" if number in _NOT_RUN else ""
        known = [str(n) for n in PAPER_TABLES]
        raise ConfigError(f"--table {number}{hint}{nearest('', known)}")
    return PAPER_TABLES[number]


def _table(entry: Mapping[str, Any]) -> PaperTable:
    head = replace(HeadConfig(), **entry.get("head", {}))
    train = replace(TrainConfig(), **entry.get("train", {}))
    return PaperTable(
        entry["number"],
        entry["caption"],
        tuple(_row(row, head, train) for row in entry["rows"]),
        entry.get("needs", ""),
    )


def _row(entry: Mapping[str, Any], head: HeadConfig, train: TrainConfig) -> PaperRow:
    recipe = Recipe(
        entry["name"],
        replace(head, **entry.get("head", {})),
        replace(train, **entry.get("train", {})),
    )
    metrics = CocoMetrics(*(round(percent / 100, 5) for percent in entry["AP"]))
    return PaperRow(entry["name"], recipe, entry.get("params_m"), entry.get("macs_g"), metrics)


_TEXT = files("mfdetr_pipelines.ablation").joinpath("paper_tables.toml").read_text()
PAPER_TABLES = {t["number"]: _table(t) for t in tomllib.loads(_TEXT)["table"]}
