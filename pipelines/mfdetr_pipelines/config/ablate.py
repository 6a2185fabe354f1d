import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mfdetr_cache.coco.layouts import ANNOTATIONS
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import FOLDER, Built, Only, Option, existing_file
from mfdetr_cache.training.recipes import RECIPES
from mfdetr_pipelines.config.shared import LocalCache, OnDevice, WorkOptions
from mfdetr_pipelines.config.training import Assignments

if TYPE_CHECKING:
    from mfdetr_pipelines.ablation.comparison import Comparison
    from mfdetr_pipelines.ablation.rows import AblationRow


@dataclass(frozen=True, slots=True)
class RowOptions:
    """Rows.

    Attributes:
        file: Rows in TOML: [[row]] tables with name, recipe and set; cache, val_cache or extract
            where they have caches of their own.
        table: A table of the paper, 1 to 16; 8 as a dry run.
        branches: The mask branches of other papers on the same frozen features, and what the papers
            publish.
        recipe: A recipe.
        baseline: A row without a head: box, ellipse, oracle or sam. Repeatable.
        label_fraction: Train every row on the masks of this part of the images. Repeatable.
        smaller: Add to every row hidden widths of 32, 16 and 8, and RoI 8 x 8.
        set: Replace a setting in every row.
        vary: Every row with each of these values, such as views=1,2,4,8; of several settings, with
            every combination.
    """

    file: Annotated[Path | None, Option("FILE", metavar="FILE", parse=existing_file)] = None
    table: int | None = None
    branches: bool = False
    recipe: Annotated[
        tuple[str, ...],
        Option(metavar="NAME", help=f"A recipe: {', '.join(RECIPES)}. Repeatable."),
    ] = ()
    baseline: Annotated[tuple[str, ...], Option(metavar="NAME")] = ()
    label_fraction: Annotated[tuple[float, ...], Option(metavar="SHARE")] = ()
    smaller: bool = False
    set: Assignments = field(default_factory=dict)
    vary: Assignments = field(default_factory=dict)

    def __post_init__(self) -> None:
        chosen = (self.file is not None, self.table is not None, self.branches, bool(self.recipe))
        if sum(chosen) != 1:
            raise ConfigError(
                "give FILE, or --table N, or --branches, or --recipe (one or more): one of the four"
            )

    def build(self) -> "Comparison":
        """The rows, with the settings that all of them get."""
        # It counts multiply-adds and knows the paper's metrics, for which torch is imported.
        from mfdetr_pipelines.ablation.comparison import comparison_of

        return comparison_of(self)


@dataclass(frozen=True, slots=True)
class RowExtraction:
    """Caches that rows ask for (Tables 11, 14, 16).

    Attributes:
        extract: Extract what rows ask for and no given cache has into --out, and let rows that
            tune the detector run it.
        weights: The detector of --cache.
        train_images: Folder of the images of --cache.
        train_annotations: Their COCO instances JSON.
        val_annotations: COCO instances JSON of --val-cache, whose images are in --images.
    """

    extract: bool = False
    weights: Annotated[str | None, Option(metavar="NAME")] = None
    train_images: Annotated[Path | None, FOLDER] = None
    train_annotations: Annotated[Path | None, ANNOTATIONS] = None
    val_annotations: Annotated[Path | None, ANNOTATIONS] = None


@dataclass(frozen=True, slots=True)
class AblateConfig(OnDevice):
    """Train and compare many heads from one cache: a table of the paper, or recipes.

    Rows that go through the cache in the same order learn from one read of it. What was trained
    before is kept: the same command goes on where it stopped. Without --cache, a dry run counts for
    the paper's H-DETR R50; with it, a step of every row is timed.

    Rows of Tables 11 and 14 have a cache each: give --cache and --val-cache once for each, in any
    order, or one of each with --extract, which extracts the others like it. Rows of Table 16 train
    with the detector in every step.

    Example:
        mfdetr ablate --table 3 --cache train2017.zarr --val-cache val2017.zarr
        --max-steps 2000 --seeds 3 --out ablations/table3

    Attributes:
        cache: Cache of the training split. Repeatable, for rows that ask for different ones.
        val_cache: Cache of the split to measure on. Repeatable, for different detector settings.
        val_split: Without --val-cache: leave every N-th image of --cache out of training and
            measure on these, to choose settings.
        out: Where runs and tables go.
        max_steps: Train every row for N steps; of rows in epochs (Tables 10, 13) the longest.
        seeds: Train every row with seeds 0 to N - 1.
        sam_weights: SAM, SAM 2 or HQ-SAM of transformers, for --baseline sam.
        images: Folder of the validation images, for sample masks and --baseline sam.
        detector_hours: Hours of the detector's training and the extraction, for a total.
        dry_run: Show rows, parameters and MACs; train nothing.
        work: Where groups of heads are trained; on a cluster its nodes share the folders.
    """

    comparison: Annotated["Comparison", Built(RowOptions)]
    cache: Annotated[tuple[str, ...], Option(metavar="CACHE")] = ()
    val_cache: Annotated[tuple[str, ...], Option(metavar="CACHE")] = ()
    val_split: int | None = None
    out: Annotated[Path, Option(metavar="FOLDER")] = Path("ablation")
    max_steps: int | None = None
    seeds: int = 1
    sam_weights: Annotated[str | None, Option(metavar="NAME")] = None
    images: Annotated[Path | None, FOLDER] = None
    detector_hours: Annotated[float | None, Option(takes_zero=True)] = None
    dry_run: bool = False
    extraction: RowExtraction = field(default_factory=RowExtraction)
    work: Annotated[WorkOptions, Only("engine", "address", "workers")] = field(
        default_factory=WorkOptions
    )
    local_cache: LocalCache = field(default_factory=LocalCache)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"--seeds {self.seeds}: give 1 or more")
        if self.detector_hours is not None and not 0 <= self.detector_hours < math.inf:
            raise ConfigError(f"--detector-hours {self.detector_hours}: give 0 or more hours")
        if self.val_cache and self.val_split is not None:
            raise ConfigError("give --val-cache or --val-split, not both")

    @property
    def rows(self) -> "tuple[AblationRow, ...]":
        """The rows, with the images that are left out of training."""
        from mfdetr_pipelines.ablation.rows import with_settings

        train = {} if self.val_split is None else {"val_split": self.val_split}
        return with_settings(self.comparison.rows, {}, train)
