"""``mfdetr train-head``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from mfdetr_pipelines.recipes import RECIPES, build_recipe

from mfdetr_cli.console import (
    ConsoleReporter,
    human_time,
    print_evaluation,
    print_facts,
    write_json,
)
from mfdetr_cli.options import DeviceOption, JsonOption, parse_assignments


def train_head(
    cache: Annotated[Path, typer.Option(help="Cache of the training split.")],
    out: Annotated[Path, typer.Option(help="Run folder: head, settings, metrics, checkpoint.")],
    val_cache: Annotated[
        Path | None, typer.Option(help="Cache of the validation split, measured at the end.")
    ] = None,
    recipe: Annotated[str, typer.Option(help=f"One of: {', '.join(RECIPES)}.")] = "fast",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of the recipe."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Train for N steps; the schedule is fitted to them.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Train for N epochs; the schedule is fitted to them.")
    ] = None,
    amp: Annotated[
        Literal["off", "bf16", "fp16"] | None,
        typer.Option(help="Half precision; the recipe's own if not given, which is off."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out.")] = False,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Train a mask network from a cache. No detector is loaded.

    Example:
    mfdetr train-head --cache train2017.zarr --val-cache val2017.zarr
    --out runs/fast --recipe fast --set lr=5e-4
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.run_folder import TrainHeadConfig
    from mfdetr_pipelines.train_head import run_train_head

    settings = parse_assignments(set_ or []) | ({} if amp is None else {"amp": amp})
    config = TrainHeadConfig(
        cache=cache,
        out=out,
        recipe=build_recipe(recipe, settings),
        val_cache=val_cache,
        epochs=epochs,
        max_steps=max_steps,
        resume=resume,
        device=device,
    )
    summary = run_train_head(config, ConsoleReporter())
    waiting = summary.waiting_seconds / max(summary.seconds, 1e-9)
    print_facts(
        f"Head {out}",
        {
            "recipe": f"{recipe}, {summary.parameters / 1e6:.2f} M parameters",
            "trained": f"{summary.steps} steps, {summary.epochs:.1f} epochs",
            "time": f"{human_time(summary.seconds)}, {summary.images_per_second:.1f} images/s, "
            f"{100 * waiting:.1f} % waiting for data",
            "loss": f"{summary.loss:.3f} (mean of the last steps)",
        },
    )
    document: dict[str, object] = {**asdict(summary), "recipe": recipe}
    if summary.validation is not None:
        metrics = summary.validation.metrics()
        print_evaluation("Validation, in percent", metrics)
        document["validation"] = {"mask": metrics["mask"], "box": metrics["box"]}
    write_json(json, document)
