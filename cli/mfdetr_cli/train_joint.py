"""``mfdetr train-joint``."""

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
    MaxStepsOption,
    RecipeOption,
    ResumeOption,
    SetOption,
    TrackOption,
    parse_batch_size,
    parse_trackers,
)
from mfdetr_cli.progress import ConsoleReporter


def train_joint(
    detector: Annotated[str, typer.Option(help="A name from mfdetr detectors.")],
    weights: Annotated[str, typer.Option(help="Its checkpoint file, folder or hub id.")],
    images: Annotated[Path, typer.Option(help="Image folder of the training split.")],
    annotations: Annotated[Path, typer.Option(help="Its COCO instances JSON.")],
    out: Annotated[Path, typer.Option(help="Run folder: head, detector, settings, metrics.")],
    tune: Annotated[
        Literal["nothing", "encoder-decoder", "all"],
        typer.Option(
            metavar="PART", help="What is tuned beside the head: nothing, encoder-decoder or all."
        ),
    ] = "encoder-decoder",
    detector_lr: Annotated[
        float, typer.Option(help="The detector's learning rate as a share of the head's.")
    ] = 0.1,
    augment: Annotated[
        Literal["none", "deformable-detr", "large-scale-jitter"],
        typer.Option(
            metavar="POLICY",
            help="Another picture of every image in every epoch: none, deformable-detr or "
            "large-scale-jitter.",
        ),
    ] = "none",
    val_images: Annotated[
        Path | None, typer.Option(help="Image folder of the validation split, measured at the end.")
    ] = None,
    val_annotations: Annotated[Path | None, typer.Option(help="Its COCO instances JSON.")] = None,
    val_every: Annotated[
        int | None,
        typer.Option(
            help="Measure every N steps too, through the detector as it is then; with --tune "
            "nothing the best weights of the head are kept."
        ),
    ] = None,
    recipe: RecipeOption = "fast",
    set_: SetOption = None,
    max_steps: MaxStepsOption = None,
    epochs: EpochsOption = None,
    encoder_layer: Annotated[
        int | None, typer.Option(help="Encoder layer whose maps the head reads; 4 by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N images.")] = None,
    batch_size: BatchSizeOption = None,
    track: TrackOption = "tensorboard",
    resume: ResumeOption = False,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Train a mask network and its detector together, without a cache (Table 16).

    For testing what freezing costs: the same recipe with the detector frozen, its encoder and
    decoder tuned, or all of it, at a tenth of the head's learning rate. torchrun starts it in
    several processes as it starts train-head.

    Example:
    mfdetr train-joint --detector hf --weights DETECTOR --images coco/train2017
    --annotations coco/annotations/instances_train2017.json --out runs/joint --tune all
    """
    from mfdetr_pipelines.train_joint import TrainJointConfig, run_train_joint

    from mfdetr_cache.detectors.options import DetectorOptions

    config = TrainJointConfig(
        detector=detector,
        weights=weights,
        images=images,
        annotations=annotations,
        out=out,
        recipe=build_recipe(recipe, parse_assignments(set_ or [])),
        tune=tune,
        detector_lr=detector_lr,
        augment=None if augment == "none" else augment,
        options=DetectorOptions(encoder_layer=encoder_layer),
        val_images=val_images,
        val_annotations=val_annotations,
        epochs=epochs,
        max_steps=max_steps,
        limit=limit,
        resume=resume,
        device=device,
        val_every=val_every,
        batch_size=parse_batch_size(batch_size),
        track=parse_trackers(track),
    )
    summary = run_train_joint(config, ConsoleReporter())
    if not is_first_process():
        return
    print_facts(
        f"Run {out}",
        {
            "tuned": f"{tune}, {summary.tuned_parameters / 1e6:.1f} M parameters of {detector}",
            "trained": f"{summary.steps} steps in {human_time(summary.seconds)}, "
            f"{summary.images_per_second:.2f} images/s",
            "losses": f"masks {summary.mask_loss:.3f}, boxes {summary.box_loss:.3f} (last steps)",
            "extract with": f"--detector {detector} --weights {summary.weights}",
        },
    )
    document: dict[str, object] = asdict(summary)
    if summary.validation is not None:
        metrics = summary.validation.metrics()
        print_evaluation("Validation, in percent", metrics)
        document["validation"] = {"mask": metrics["mask"], "box": metrics["box"]}
    write_json(json, document)
