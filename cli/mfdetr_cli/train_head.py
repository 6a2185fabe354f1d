"""``mfdetr train-head``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from mfdetr_pipelines.config.shared import parse_assignments

from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cli.console import (
    human_time,
    is_first_process,
    print_evaluation,
    print_facts,
    write_json,
)
from mfdetr_cli.options import (
    BatchSizeOption,
    DeviceOption,
    EpochsOption,
    JsonOption,
    LocalCacheOption,
    LocalCacheSizeOption,
    MaxStepsOption,
    RecipeOption,
    ResumeOption,
    SetOption,
    TrackOption,
    parse_batch_size,
    parse_trackers,
    storage_at,
)
from mfdetr_cli.progress import ConsoleReporter


def train_head(
    cache: Annotated[str, typer.Option(help="Cache of the training split: a folder, or a URL.")],
    out: Annotated[Path, typer.Option(help="Run folder: head, settings, metrics, checkpoint.")],
    val_cache: Annotated[
        str | None, typer.Option(help="Cache of the validation split, measured at the end.")
    ] = None,
    val_every: Annotated[
        int | None,
        typer.Option(
            help="Measure every N steps too, on --val-cache or what --set val_split=M keeps; the "
            "best weights are kept."
        ),
    ] = None,
    recipe: RecipeOption = "fast",
    set_: SetOption = None,
    max_steps: MaxStepsOption = None,
    epochs: EpochsOption = None,
    amp: Annotated[
        Literal["off", "bf16", "fp16"] | None,
        typer.Option(help="Half precision; the recipe's own if not given, which is off."),
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            help="Hide the masks of this category from training; evaluate then tells seen from "
            "unseen categories. Repeatable."
        ),
    ] = None,
    batch_size: BatchSizeOption = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the network; the first steps take minutes.")
    ] = False,
    track: TrackOption = "tensorboard",
    resume: ResumeOption = False,
    local_cache: LocalCacheOption = None,
    local_cache_size: LocalCacheSizeOption = "100GB",
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Train a mask network from a cache. No detector is loaded.

    Example:
    mfdetr train-head --cache train2017.zarr --val-cache val2017.zarr
    --out runs/fast --recipe fast --set lr=5e-4

    Several GPUs: torchrun --nproc-per-node 4 -m mfdetr_cli train-head ...; a step keeps its batch
    and is divided among the processes.
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.train_head import TrainHeadConfig, run_train_head

    settings = parse_assignments(set_ or []) | ({} if amp is None else {"amp": amp})
    if compile_:
        settings["compile"] = "true"
    config = TrainHeadConfig(
        cache=storage_at(cache, local_cache, local_cache_size),
        out=out,
        recipe=build_recipe(recipe, settings),
        val_cache=None
        if val_cache is None
        else storage_at(val_cache, local_cache, local_cache_size),
        val_every=val_every,
        batch_size=parse_batch_size(batch_size),
        hold_out=tuple(hold_out or ()),
        track=parse_trackers(track),
        epochs=epochs,
        max_steps=max_steps,
        resume=resume,
        device=device,
    )
    summary = run_train_head(config, ConsoleReporter())
    if not is_first_process():
        return
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
    if summary.best_AP is not None and summary.best_step != summary.steps:
        print_facts(
            "", {"best": f"mask AP {100 * summary.best_AP:.1f} at step {summary.best_step}"}
        )
    if summary.validation is not None:
        metrics = summary.validation.metrics()
        print_evaluation("Validation, in percent", metrics)
        document["validation"] = {"mask": metrics["mask"], "box": metrics["box"]}
    write_json(json, document)
