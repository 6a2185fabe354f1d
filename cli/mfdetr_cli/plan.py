"""``mfdetr plan``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from mfdetr_cache.training.recipes import RECIPES, build_recipe
from mfdetr_cli.console import (
    ConsoleReporter,
    human_bytes,
    human_time,
    print_facts,
    print_table,
    write_json,
)
from mfdetr_cli.options import DeviceOption, JsonOption


def plan(
    weights: Annotated[str, typer.Option(help="The detector: folder, hub id or checkpoint.")],
    annotations: Annotated[Path, typer.Option(help="COCO instances JSON of the dataset.")],
    detector: Annotated[str, typer.Option(help="See: mfdetr detectors.")] = "hf",
    images: Annotated[
        Path | None, typer.Option(help="Measure on real pictures; without, on noise.")
    ] = None,
    disk: Annotated[Path | None, typer.Option(help="Where the cache would go.")] = None,
    recipe: Annotated[str, typer.Option(help=f"One of: {', '.join(RECIPES)}.")] = "paper",
    epochs: Annotated[float, typer.Option(help="Length of one training.")] = 6.0,
    views: Annotated[int, typer.Option(help="Augmented views beside the plain one.")] = 0,
    c1: Annotated[
        Literal["full", "roi", "none"], typer.Option(help="How much of C1 would be kept.")
    ] = "full",
    roi_size: Annotated[int, typer.Option(help="Cells of a crop, for --c1 roi.")] = 32,
    num_queries: Annotated[int | None, typer.Option(help="Keep the N best queries.")] = None,
    encoder_layer: Annotated[int | None, typer.Option(help="Encoder layer, from 1.")] = None,
    sample: Annotated[int, typer.Option(help="Images to measure on.")] = 8,
    disk_seconds: Annotated[
        float, typer.Option(help="Seconds to write; longer than the drive's write cache lasts.")
    ] = 10.0,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Tell what a cache will cost before it is made: bytes, hours, and when it pays.

    Example:
    mfdetr plan --weights PekingU/rtdetr_r50vd --annotations annotations/instances_train2017.json
    --images train2017 --disk /data
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.plan import PlanConfig, run_plan

    from mfdetr_cache.detectors.options import DetectorOptions

    config = PlanConfig(
        detector=detector,
        weights=weights,
        annotations=annotations,
        recipe=build_recipe(recipe, {}),
        images=images,
        disk=disk,
        sample=sample,
        disk_seconds=disk_seconds,
        epochs=epochs,
        views=views,
        options=DetectorOptions(num_queries, encoder_layer),
        c1=c1,
        roi_size=roi_size,
        device=device,
    )
    found = run_plan(config, ConsoleReporter())
    print_facts(
        f"{found.images} images, {found.views} passes each",
        {
            "detector": f"{1000 * found.detector_seconds:.0f} ms an image",
            "head": f"{1000 * found.head_seconds:.0f} ms an image, forward and backward ({recipe})",
            "disk": f"{found.disk}: {human_bytes(found.free_bytes)} free, writes "
            f"{human_bytes(found.write_bytes_per_second)}/s, reads "
            f"{human_bytes(found.read_bytes_per_second)}/s",
            "live": f"{human_time(3600 * found.live_hours)} for {epochs:g} epochs with the "
            "detector in the loop",
        },
    )
    rows = [
        [
            p.preset,
            human_bytes(p.bytes_per_image),
            human_bytes(p.total_bytes) + ("" if p.fits else " !"),
            human_time(3600 * p.extract_hours),
            human_time(3600 * p.cached_hours),
            "never" if p.pays_after is None else str(p.pays_after),
        ]
        for p in found.presets
    ]
    columns = ["preset", "an image", "cache", "extract", "one training", "pays after"]
    print_table("Presets (! does not fit the disk)", columns, rows)
    write_json(json, asdict(found))
