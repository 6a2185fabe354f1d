"""Options that the commands share that train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from mfdetr_cache.choices import Tracker
from mfdetr_cache.options import FILE, Option
from mfdetr_cache.training.recipes import AUTO, RECIPES, Recipe, build_recipe
from mfdetr_pipelines.config.shared import OnDevice


def parse_assignments(texts: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` texts as a dictionary; a later one of a key replaces an earlier one."""
    pairs = [text.partition("=") for text in texts]
    if not all(separator and key for key, separator, _ in pairs):
        raise ValueError("write key=value, such as lr=3e-4")
    return {key.strip(): value.strip() for key, _, value in pairs}


Assignments = Annotated[Mapping[str, str], Option(parse=parse_assignments)]
RECIPE = Option(metavar="NAME", help=f"One of: {', '.join(RECIPES)}.")
RECIPE_OR_AUTO = Option(
    metavar="NAME",
    help=f"{AUTO}, which fits one to the cache and the device, or: {', '.join(RECIPES)}.",
)


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """Recipe.

    Attributes:
        recipe: Name of a recipe.
        set: Replace a setting of the recipe, such as lr=3e-4; mfdetr recipes lists them.
        config: A file with recipe, head and train in place of a recipe's name: the config.json of
            a run, or TOML.
    """

    recipe: Annotated[str, RECIPE] = "fast"
    set: Assignments = field(default_factory=dict)
    config: Annotated[Path | None, FILE] = None

    def build(self) -> Recipe:
        """The recipe with its settings replaced."""
        return build_recipe(self.recipe, self.set, self.config)


@dataclass(frozen=True, slots=True)
class RecipesConfig:
    """List the recipes, or the settings of one: value, the paper's value, and meaning.

    Example:
        mfdetr recipes fast

    Attributes:
        recipe: Whose settings to list.
    """

    recipe: Annotated[str | None, Option("recipe", metavar="NAME")] = None


def parse_batch_size(text: str) -> int | Literal["auto"]:
    """A number of images, or ``auto``."""
    if text == "auto":
        return "auto"
    if not text.isdigit():
        raise ValueError("give a number, or auto")
    return int(text)


def parse_trackers(text: str) -> tuple[Tracker, ...]:
    """Names with commas between them; ``none`` is no name. Whether they are known is seen later."""
    names = (name.strip() for name in text.split(","))
    return tuple(name for name in names if name not in ("", "none"))  # type: ignore[misc]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun(OnDevice):
    """A command that trains.

    Attributes:
        batch_size: Images per step instead of the recipe's; auto keeps the recipe's and computes a
            step in as many micro-batches as the GPU's memory asks for.
        from_head: Start from the weights of this trained head, which has the same settings.
        track: Where numbers go beside metrics.jsonl: tensorboard, wandb, mlflow, several with
            commas, or none.
        resume: Go on with the run in --out; it becomes longer with a larger --max-steps or
            --epochs.
    """

    batch_size: Annotated[
        int | Literal["auto"] | None, Option(metavar="N|auto", parse=parse_batch_size)
    ] = None
    from_head: Annotated[Path | None, Option(metavar="FOLDER")] = None
    track: Annotated[tuple[Tracker, ...], Option(metavar="NAMES", parse=parse_trackers)] = (
        "tensorboard",
    )
    resume: bool = False
