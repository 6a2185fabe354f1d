from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import Built, Option
from mfdetr_cache.training.config import Length
from mfdetr_cache.training.recipes import Recipe, asked_recipe
from mfdetr_pipelines.config.shared import CacheOption, LocalCache, OptionalCache
from mfdetr_pipelines.config.training import RECIPE_OR_AUTO, RecipeOptions, TrainingRun


@dataclass(frozen=True, slots=True)
class TrainingRecipe(RecipeOptions):
    """Recipe.

    Attributes:
        recipe: Name of a recipe, or auto: fitted to the cache and the device, with the reasons.
        amp: Half precision; the recipe's own by default, which is off.
        compile: Compile the network; the first steps take minutes.
    """

    recipe: Annotated[str, RECIPE_OR_AUTO] = "fast"
    amp: Literal["off", "bf16", "fp16"] | None = None
    compile: bool = False

    def build(self) -> Recipe:
        """The recipe with its settings replaced."""
        changes: dict[str, str] = {} if self.amp is None else {"amp": self.amp}
        if self.compile:
            changes["compile"] = "true"
        return asked_recipe(self.recipe, {**self.set, **changes}, self.config)


@dataclass(frozen=True, slots=True)
class Validation:
    """Validation.

    Attributes:
        val_cache: Cache of the validation split, measured at the end.
        val_every: Measure every N steps too, on --val-cache or what --set val_split=M keeps; the
            best weights are kept.
        early_stop: End the training after N of these measurements in a row without a better mask
            AP. The schedule stays that of the whole length.
    """

    val_cache: OptionalCache = None
    val_every: int | None = None
    early_stop: int | None = None

    def __post_init__(self) -> None:
        if self.early_stop is not None and self.val_every is None:
            raise ConfigError("--early-stop counts measurements: give --val-every too")
        if self.val_every is not None and self.val_every < 1:
            raise ConfigError(f"--val-every must be 1 or more, not {self.val_every}")


@dataclass(frozen=True, slots=True)
class TrainHeadConfig(TrainingRun):
    """Train a mask network from a cache. No detector is loaded.

    Several GPUs: torchrun --nproc-per-node 4 -m mfdetr_cli train-head ...; a step keeps its batch
    and is divided among the processes.

    Example:
        mfdetr train-head --cache train2017.zarr --val-cache val2017.zarr
        --out runs/fast --recipe fast --set lr=5e-4

    Attributes:
        cache: Cache of the training split: a folder, or a URL.
        out: Run folder: head, settings, metrics, checkpoint.
        hold_out: Hide the masks of this category from training; evaluate then tells seen from
            unseen categories. Repeatable.
    """

    cache: CacheOption
    out: Annotated[Path, Option(metavar="FOLDER")]
    recipe: Annotated[Recipe, Built(TrainingRecipe)]
    hold_out: Annotated[tuple[str, ...], Option(metavar="NAME")] = ()
    length: Length = field(default_factory=Length)
    validation: Validation = field(default_factory=Validation)
    local_cache: LocalCache = field(default_factory=LocalCache)
