import inspect
from dataclasses import asdict
from typing import Any

from mfdetr_pipelines.config.training import RecipesConfig
from mfdetr_pipelines.config.typed import as_typed

from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.recipes import AUTO, RECIPES, Recipe, build_recipe
from mfdetr_cli.console import print_lines, print_table
from mfdetr_cli.output import CommandOutput
from mfdetr_cli.signature import documented

_AUTO = "fast or paper, fitted to the cache and the device by train-head and fit, which say why."


def recipes(config: RecipesConfig, out: CommandOutput) -> None:
    """List recipes, or all settings of one."""
    texts = {name: (inspect.getdoc(r) or "").replace("``", "") for name, r in RECIPES.items()}
    if config.recipe is None:
        every = [{"name": name, **_settings(build_recipe(name, {}))} for name in RECIPES]
        out.write_json({"recipes": every})
        rows = [[name, text.partition("\n")[0]] for name, text in {**texts, AUTO: _AUTO}.items()]
        print_table("Recipes", ["", "what it is"], rows, justify="left")
        return
    if config.recipe == AUTO:
        out.write_json({"recipe": AUTO})
        print_lines(_AUTO)
        return
    recipe = build_recipe(config.recipe, {})
    # As train-head --config takes it.
    out.write_json({"recipe": recipe.name, **_settings(recipe)})
    print_lines(texts[recipe.name], "")
    for title, own, paper in (
        ("Mask network: --set NAME=VALUE", recipe.head, HeadConfig()),
        ("Training: --set NAME=VALUE", recipe.train, TrainConfig()),
    ):
        values, defaults = asdict(own), asdict(paper)
        rows = [
            [name, as_typed(values[name]), as_typed(defaults[name]), text.replace("``", "")]
            for name, text in documented(type(own))[1].items()
        ]
        print_table(title, ["", "value", "paper", "meaning"], rows, justify="left")


def _settings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    return {"head": asdict(recipe.head), "train": asdict(recipe.train)}
