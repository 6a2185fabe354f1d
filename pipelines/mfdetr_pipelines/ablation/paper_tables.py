"""The paper's tables (arXiv 2308.03747) as configurations, read from ``paper_tables.toml``."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, Literal

from mfdetr_cache.choices import Tune
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.recipes import Recipe


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One row of a table.

    Attributes:
        name: Label of the row.
        recipe: Head and training settings.
        params_m: Printed parameters in millions; None if the table has no such column.
        macs_g: Printed "FLOPs" in 10^9, which are multiply-adds.
        metrics: Printed mask AP in [0, 1], -1 for a part that is not; None if it has none.
        epochs: Length of the training; None for the recipe's steps.
        own_width: Whether the hidden width is the detector's own.
        detector: The detector whose geometry the paper counted.
        extract: How its cache is extracted, by option.
        tune: What of the detector is trained too; empty for nothing, from a cache.
    """

    name: str
    recipe: Recipe
    params_m: float | None
    macs_g: float | None
    metrics: CocoMetrics | None
    epochs: float | None = None
    own_width: bool = False
    detector: str = "h-detr-r50"
    extract: Mapping[str, int | str] = field(default_factory=dict)
    tune: Tune | Literal[""] = ""

    @property
    def AP(self) -> float | None:
        """Printed mask AP in [0, 1]."""
        return None if self.metrics is None else self.metrics.AP


@dataclass(frozen=True, slots=True)
class PublishedSystem:
    """What others have published, on the split of the table.

    Attributes:
        system: Its name.
        backbone: Its backbone.
        source: Where the numbers stand.
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

    def cells(self) -> list[str]:
        """In the order of ``PUBLISHED_COLUMNS``, a dash for what is not printed."""
        whole = (self.epochs, self.hours)
        aps = (self.box_AP, self.AP, self.AP50, self.AP75, self.APS, self.APM, self.APL)
        texts = ["-" if n is None else f"{n:g}" for n in whole]
        texts += ["-" if n is None else f"{n:.1f}" for n in aps]
        return [self.system, self.backbone, *texts, self.source]


PUBLISHED_COLUMNS = (
    "published", "backbone", "epochs", "V100 h", "box AP",
    "AP", "AP50", "AP75", "APS", "APM", "APL", "source",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        number: Its number.
        caption: What it compares.
        rows: What can be trained or counted.
        needs: What the training needs beyond one cache, if anything.
        published: Other systems it compares with.
    """

    number: int
    caption: str
    rows: tuple[PaperRow, ...]
    needs: str = ""
    published: tuple[PublishedSystem, ...] = ()


def paper_table(number: int) -> PaperTable:
    """A table by its number; ConfigError if there is no such table."""
    if number not in PAPER_TABLES:
        raise ConfigError(f"--table {number}: the paper has 1 to {max(PAPER_TABLES)}")
    return PAPER_TABLES[number]


def _table(entry: Mapping[str, Any]) -> PaperTable:
    rows = tuple(_row({**entry, **row}, entry, row) for row in entry["rows"])
    published = tuple(PublishedSystem(**system) for system in entry.get("published", ()))
    return PaperTable(entry["number"], entry["caption"], rows, entry.get("needs", ""), published)


def _row(both: Mapping[str, Any], *changes: Mapping[str, Any]) -> PaperRow:
    """A row from its entry and its table's defaults; changes of head and training are merged."""
    head, train = HeadConfig(), TrainConfig()
    for change in changes:
        head = replace(head, **change.get("head", {}))
        train = replace(train, **change.get("train", {}))
    return PaperRow(
        both["name"],
        Recipe(both["name"], head, train),
        both.get("params_m"),
        both.get("macs_g"),
        CocoMetrics(*(round(p / 100, 5) for p in both["AP"])) if "AP" in both else None,
        both.get("epochs"),
        both.get("own_width", False),
        both.get("detector", "h-detr-r50"),
        both.get("extract", {}),
        both.get("tune", ""),
    )


_TEXT = files("mfdetr_pipelines.ablation").joinpath("paper_tables.toml").read_text()
PAPER_TABLES = {t["number"]: _table(t) for t in tomllib.loads(_TEXT)["table"]}
