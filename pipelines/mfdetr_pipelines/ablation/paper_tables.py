"""The paper's tables (arXiv 2308.03747) as configurations, with the figures it prints beside them.

Each row is a change to the table's base recipe. The bases follow from the parameter and FLOP
columns: the tables build on one another, and point sampling comes in with Table 6.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mfdetr_cache.config import nearest
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.recipes import Recipe


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One row of a table.

    Attributes:
        name: What distinguishes it.
        params_m: Printed parameters in millions; None where the table has no such column.
        macs_g: Printed "FLOPs" in 10^9, which are multiply-adds.
        metrics: Printed mask AP in [0, 1].
        head: Changes to the base's architecture.
        train: Changes to the base's training.
    """

    name: str
    params_m: float | None
    macs_g: float | None
    metrics: CocoMetrics
    head: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        number: Its number.
        caption: What it studies.
        base: What its rows change.
        rows: Its rows in the order of the paper.
        needs: What it needs beyond one cache; empty where one cache serves all rows.
    """

    number: int
    caption: str
    base: Recipe
    rows: tuple[PaperRow, ...]
    needs: str = ""

    def recipe(self, row: PaperRow) -> Recipe:
        """The configuration of a row.

        Args:
            row: One of the rows.

        Returns:
            The base with the row's changes.
        """
        head = replace(self.base.head, **row.head)
        return Recipe(row.name, head, replace(self.base.train, **row.train))


def _row(
    name: str,
    params_m: float | None,
    macs_g: float | None,
    percent: tuple[float, ...],
    head: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
) -> PaperRow:
    metrics = CocoMetrics(*(round(p / 100, 5) for p in percent))
    return PaperRow(name, params_m, macs_g, metrics, head or {}, train or {})


_GRID = TrainConfig(points="grid")
_FINAL = Recipe("final", HeadConfig(), TrainConfig())
_TABLE_5 = Recipe("table 5", HeadConfig(neck=False, mask_scoring=False), _GRID)
_TABLE_4 = Recipe("table 4", replace(_TABLE_5.head, query_ffn=False, query_b2o=False), _GRID)
_TABLE_3 = Recipe("table 3", replace(_TABLE_4.head, hidden_dim=256), _GRID)
_TABLE_2 = Recipe("table 2", replace(_TABLE_3.head, box_layers=0), _GRID)
_TABLE_1 = Recipe(
    "table 1", replace(_TABLE_2.head, image_layers=0, upsample_without_c1=True), _GRID
)

PAPER_TABLES: dict[int, PaperTable] = {
    table.number: table
    for table in (
        PaperTable(
            1,
            "Training-free baselines",
            _TABLE_1,
            (
                _row(
                    "no RoIAlign, no C1",
                    0.0,
                    1.49,
                    (0.0, 0.1, 0.0, 0.0, 0.0, 0.1),
                    head={"roialign": False, "use_c1": False},
                ),
                _row(
                    "RoIAlign, no C1",
                    0.0,
                    0.53,
                    (4.4, 14.8, 1.3, 2.7, 4.6, 7.5),
                    head={"roialign": True, "use_c1": False},
                ),
                _row(
                    "no RoIAlign, C1",
                    0.0,
                    1.5,
                    (0.0, 0.1, 0.0, 0.0, 0.0, 0.1),
                    head={"roialign": False, "use_c1": True},
                ),
                _row(
                    "RoIAlign, C1",
                    0.0,
                    0.54,
                    (5.1, 17.0, 1.5, 3.2, 4.9, 8.4),
                    head={"roialign": True, "use_c1": True},
                ),
            ),
        ),
        PaperTable(
            2,
            "Image feature encoder",
            _TABLE_2,
            (
                _row("none", 0.0, 0.54, (5.1, 17.0, 1.5, 3.2, 4.9, 8.4), head={"image_layers": 0}),
                _row(
                    "deformable x1",
                    0.76,
                    14.71,
                    (30.8, 58.2, 29.5, 13.5, 32.7, 49.0),
                    head={"image_layers": 1, "image_block": "deformable"},
                ),
                _row(
                    "deformable x2",
                    1.51,
                    28.88,
                    (32.9, 60.0, 32.4, 14.9, 35.3, 52.1),
                    head={"image_layers": 2, "image_block": "deformable"},
                ),
                _row(
                    "deformable x3",
                    2.27,
                    43.04,
                    (33.7, 60.5, 33.7, 15.1, 36.3, 53.4),
                    head={"image_layers": 3, "image_block": "deformable"},
                ),
                _row(
                    "swin x1",
                    0.8,
                    14.2,
                    (30.0, 58.0, 28.0, 13.8, 32.3, 46.3),
                    head={"image_layers": 1, "image_block": "swin"},
                ),
                _row(
                    "swin x2",
                    1.59,
                    27.86,
                    (31.6, 59.2, 30.4, 14.5, 34.2, 48.6),
                    head={"image_layers": 2, "image_block": "swin"},
                ),
                _row(
                    "swin x3",
                    2.39,
                    41.51,
                    (32.2, 59.6, 31.3, 14.9, 34.8, 49.5),
                    head={"image_layers": 3, "image_block": "swin"},
                ),
                _row(
                    "convnext x1",
                    0.54,
                    8.12,
                    (27.5, 55.9, 24.4, 12.7, 29.8, 42.1),
                    head={"image_layers": 1, "image_block": "convnext"},
                ),
                _row(
                    "convnext x2",
                    1.08,
                    15.7,
                    (30.0, 58.1, 27.8, 13.9, 32.4, 46.0),
                    head={"image_layers": 2, "image_block": "convnext"},
                ),
                _row(
                    "convnext x3",
                    1.62,
                    23.27,
                    (30.7, 58.5, 28.9, 14.3, 33.2, 46.9),
                    head={"image_layers": 3, "image_block": "convnext"},
                ),
            ),
        ),
        PaperTable(
            3,
            "Box feature encoder",
            _TABLE_3,
            (
                _row(
                    "none",
                    1.51,
                    28.88,
                    (32.9, 60.0, 32.4, 14.9, 35.3, 52.1),
                    head={"box_layers": 0},
                ),
                _row(
                    "deformable x1",
                    2.46,
                    98.55,
                    (44.4, 67.6, 48.0, 24.5, 47.7, 62.8),
                    head={"box_layers": 1, "box_block": "deformable"},
                ),
                _row(
                    "deformable x2",
                    3.14,
                    168.23,
                    (44.9, 67.7, 48.6, 24.9, 48.2, 63.4),
                    head={"box_layers": 2, "box_block": "deformable"},
                ),
                _row(
                    "deformable x3",
                    3.82,
                    237.91,
                    (45.1, 67.8, 48.9, 25.2, 48.4, 63.7),
                    head={"box_layers": 3, "box_block": "deformable"},
                ),
                _row(
                    "swin x1",
                    2.31,
                    112.84,
                    (42.5, 66.3, 45.4, 23.0, 45.5, 61.2),
                    head={"box_layers": 1, "box_block": "swin"},
                ),
                _row(
                    "swin x2",
                    3.1,
                    196.81,
                    (43.7, 66.9, 46.8, 23.8, 46.8, 62.3),
                    head={"box_layers": 2, "box_block": "swin"},
                ),
                _row(
                    "swin x3",
                    3.89,
                    280.77,
                    (44.3, 67.3, 47.6, 24.4, 47.6, 62.8),
                    head={"box_layers": 3, "box_block": "swin"},
                ),
                _row(
                    "convnext x1",
                    2.05,
                    83.9,
                    (40.9, 65.8, 43.4, 21.4, 43.8, 59.9),
                    head={"box_layers": 1, "box_block": "convnext"},
                ),
                _row(
                    "convnext x2",
                    2.59,
                    138.92,
                    (43.0, 66.9, 46.0, 23.4, 46.1, 61.7),
                    head={"box_layers": 2, "box_block": "convnext"},
                ),
                _row(
                    "convnext x3",
                    3.13,
                    193.95,
                    (43.7, 67.2, 47.1, 23.9, 47.0, 62.1),
                    head={"box_layers": 3, "box_block": "convnext"},
                ),
            ),
        ),
        PaperTable(
            4,
            "Hidden dimension",
            _TABLE_4,
            (
                _row(
                    "d=256",
                    3.14,
                    168.23,
                    (44.9, 67.7, 48.6, 24.9, 48.2, 63.4),
                    head={"hidden_dim": 256},
                ),
                _row(
                    "d=128",
                    2.07,
                    66.6,
                    (44.7, 67.6, 48.2, 24.8, 48.1, 63.2),
                    head={"hidden_dim": 128},
                ),
                _row(
                    "d=96",
                    1.87,
                    50.76,
                    (44.6, 67.5, 48.2, 24.7, 47.9, 63.2),
                    head={"hidden_dim": 96},
                ),
                _row(
                    "d=64",
                    1.71,
                    39.11,
                    (44.5, 67.5, 48.0, 24.7, 47.9, 63.0),
                    head={"hidden_dim": 64},
                ),
            ),
        ),
        PaperTable(
            5,
            "Query encoder",
            _TABLE_4,
            (
                _row(
                    "none",
                    2.07,
                    66.6,
                    (44.7, 67.6, 48.2, 24.8, 48.1, 63.2),
                    head={"query_ffn": False, "query_o2o": False, "query_b2o": False},
                ),
                _row(
                    "FFN",
                    2.33,
                    66.63,
                    (44.7, 67.6, 48.3, 24.9, 48.0, 63.2),
                    head={"query_ffn": True, "query_o2o": False, "query_b2o": False},
                ),
                _row(
                    "FFN + O2O",
                    2.53,
                    66.65,
                    (43.9, 67.1, 47.3, 24.4, 47.3, 61.8),
                    head={"query_ffn": True, "query_o2o": True, "query_b2o": False},
                ),
                _row(
                    "FFN + B2O",
                    2.46,
                    73.4,
                    (44.8, 67.6, 48.4, 24.9, 48.1, 63.4),
                    head={"query_ffn": True, "query_o2o": False, "query_b2o": True},
                ),
            ),
        ),
        PaperTable(
            6,
            "Neck, sampled points, mask scoring",
            _TABLE_5,
            (
                _row(
                    "none",
                    2.46,
                    73.4,
                    (44.8, 67.6, 48.4, 24.9, 48.1, 63.4),
                    head={"neck": False, "mask_scoring": False},
                    train={"points": "grid"},
                ),
                _row(
                    "neck",
                    2.53,
                    77.07,
                    (45.2, 67.8, 48.9, 25.3, 48.5, 63.8),
                    head={"neck": True, "mask_scoring": False},
                    train={"points": "grid"},
                ),
                _row(
                    "neck + points",
                    2.53,
                    77.07,
                    (45.3, 67.8, 49.2, 25.4, 48.6, 64.1),
                    head={"neck": True, "mask_scoring": False},
                    train={"points": "sampled"},
                ),
                _row(
                    "neck + points + scoring",
                    3.26,
                    82.09,
                    (45.7, 67.5, 49.8, 25.6, 48.9, 64.1),
                    head={"neck": True, "mask_scoring": True},
                    train={"points": "sampled"},
                ),
            ),
        ),
        PaperTable(
            9,
            "RoIAlign output size",
            _FINAL,
            (
                _row(
                    "16 x 16",
                    2.97,
                    46.09,
                    (44.8, 67.5, 49.1, 25.4, 48.0, 62.0),
                    head={"roi_size": 16},
                ),
                _row(
                    "32 x 32",
                    3.26,
                    82.09,
                    (45.7, 67.5, 49.8, 25.6, 48.9, 64.1),
                    head={"roi_size": 32},
                ),
                _row(
                    "64 x 64",
                    4.44,
                    225.86,
                    (45.9, 67.6, 50.2, 25.8, 49.1, 64.4),
                    head={"roi_size": 64},
                ),
            ),
        ),
        PaperTable(
            10,
            "Training epochs",
            _FINAL,
            (
                _row(
                    "6 epochs",
                    None,
                    None,
                    (45.7, 67.5, 49.8, 25.6, 48.9, 64.1),
                    train={"steps": 88500},
                ),
                _row(
                    "12 epochs",
                    None,
                    None,
                    (46.0, 67.7, 50.3, 25.9, 49.1, 64.3),
                    train={"steps": 177000},
                ),
            ),
        ),
        PaperTable(
            11,
            "Large-scale jittering",
            _FINAL,
            (
                _row("flip, resize, crop", None, None, (45.7, 67.5, 49.8, 25.6, 48.9, 64.1)),
                _row("large-scale jittering", None, None, (46.0, 67.7, 50.1, 26.1, 49.1, 64.0)),
            ),
            needs="a second cache: mfdetr extract --views N --view-policy large-scale-jitter",
        ),
        PaperTable(
            12,
            "Mask head",
            _FINAL,
            (
                _row(
                    "dot product",
                    3.26,
                    82.09,
                    (45.7, 67.5, 49.8, 25.6, 48.9, 64.1),
                    head={"mask_predictor": "dot"},
                ),
                _row(
                    "segmenter",
                    3.29,
                    83.77,
                    (45.7, 67.6, 49.9, 25.6, 48.9, 64.1),
                    head={"mask_predictor": "segmenter"},
                ),
            ),
        ),
        PaperTable(
            13,
            "Batch size",
            _FINAL,
            (
                _row(
                    "batch 2",
                    None,
                    None,
                    (45.9, 67.7, 50.0, 25.7, 49.0, 64.2),
                    train={"batch_size": 2},
                ),
                _row(
                    "batch 4",
                    None,
                    None,
                    (45.9, 67.6, 49.9, 25.8, 49.0, 64.3),
                    train={"batch_size": 4},
                ),
                _row(
                    "batch 8",
                    None,
                    None,
                    (45.7, 67.5, 49.8, 25.6, 48.9, 64.1),
                    train={"batch_size": 8},
                ),
            ),
        ),
        PaperTable(
            14,
            "Encoder layer that supplies E",
            _FINAL,
            (
                _row("encoder layer 2", None, None, (45.7, 67.5, 49.8, 25.7, 48.9, 64.0)),
                _row("encoder layer 4", None, None, (45.7, 67.5, 49.8, 25.6, 48.9, 64.1)),
                _row("encoder layer 6", None, None, (45.5, 67.5, 49.3, 25.6, 48.7, 63.7)),
            ),
            needs="a cache for every layer: mfdetr extract --encoder-layer N",
        ),
        PaperTable(
            15,
            "Depths, DINO with FocalNet-L",
            _FINAL,
            (
                _row(
                    "image x2, box x2",
                    3.24,
                    262.27,
                    (54.9, 78.9, 60.8, 37.2, 58.4, 72.9),
                    head={"image_layers": 2, "box_layers": 2},
                ),
                _row(
                    "image x2, box x3",
                    3.62,
                    326.65,
                    (54.9, 78.9, 60.7, 37.0, 58.5, 72.9),
                    head={"image_layers": 2, "box_layers": 3},
                ),
                _row(
                    "image x3, box x2",
                    4.03,
                    320.44,
                    (55.0, 78.9, 60.9, 37.1, 58.5, 73.0),
                    head={"image_layers": 3, "box_layers": 2},
                ),
                _row(
                    "image x3, box x3",
                    4.4,
                    384.82,
                    (55.0, 78.9, 60.9, 37.2, 58.5, 73.1),
                    head={"image_layers": 3, "box_layers": 3},
                ),
                _row(
                    "image x4, box x4",
                    5.56,
                    507.38,
                    (55.0, 78.9, 60.8, 37.2, 58.4, 73.2),
                    head={"image_layers": 4, "box_layers": 4},
                ),
            ),
        ),
    )
}


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
        known = [str(n) for n in PAPER_TABLES]
        reasons = {
            7: "comparison of systems, nothing to run",
            8: "comparison of systems, nothing to run",
            16: "it trains the detector too and needs no cache: mfdetr train-joint --tune nothing, "
            "encoder-decoder or all",
        }
        hint = f" ({reasons[number]})" if number in reasons else ""
        raise ConfigError(f"--table {number}{hint}{nearest('', known)}")
    return PAPER_TABLES[number]
