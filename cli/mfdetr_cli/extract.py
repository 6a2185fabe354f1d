"""``mfdetr extract``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from mfdetr_cli.console import (
    ConsoleReporter,
    human_bytes,
    human_time,
    metric_rows,
    print_facts,
    print_table,
    write_json,
)
from mfdetr_cli.options import DeviceOption, JsonOption, parse_partition


def extract(
    weights: Annotated[
        str, typer.Option(help="The detector: hub id, folder in its layout, or an official .pth.")
    ],
    images: Annotated[Path, typer.Option(help="Folder with the images.")],
    annotations: Annotated[Path, typer.Option(help="COCO instances JSON of these images.")],
    cache: Annotated[
        str, typer.Option(help="Where the cache goes: a folder such as val2017.zarr, or a URL.")
    ],
    detector: Annotated[str, typer.Option(help="See: mfdetr detectors.")] = "hf",
    limit: Annotated[int | None, typer.Option(help="Only the first N images.")] = None,
    num_queries: Annotated[
        int | None, typer.Option(help="Keep the N queries of highest class score per image.")
    ] = None,
    encoder_layer: Annotated[
        int | None,
        typer.Option(help="Encoder layer that supplies the encoder maps, from 1 (default 4)."),
    ] = None,
    no_backbone_stride8: Annotated[
        bool,
        typer.Option(
            "--no-backbone-stride8",
            help="Leave out the backbone's stride-8 map, which is kept where the encoder has no "
            "such level.",
        ),
    ] = False,
    dtype: Annotated[
        Literal["fp16", "int8", "int8-small", "int4"],
        typer.Option(
            metavar="PRESET",
            help="How maps are stored: fp16, int8, int8-small or int4, from large to small.",
        ),
    ] = "int8",
    compression: Annotated[
        Literal["zstd", "raw"], typer.Option(help="Compress chunks, or leave them as they are.")
    ] = "zstd",
    c1: Annotated[
        Literal["full", "roi", "none"],
        typer.Option(
            metavar="MODE",
            help="The stride-4 map: full; roi, as crops around matched queries, for training only; "
            "or none.",
        ),
    ] = "full",
    roi_size: Annotated[int, typer.Option(help="Cells of a crop, for --c1 roi.")] = 32,
    roi_sampling_ratio: Annotated[
        int, typer.Option(help="RoIAlign samples per bin, for --c1 roi; 0 adapts to the box.")
    ] = 0,
    views: Annotated[
        int, typer.Option(help="Augmented passes per image beside the plain one; for training.")
    ] = 0,
    view_policy: Annotated[
        Literal["deformable-detr", "large-scale-jitter"],
        typer.Option(
            metavar="POLICY",
            help="deformable-detr: flip, multi-scale resize and crop; or large-scale-jitter "
            "(Table 11).",
        ),
    ] = "deformable-detr",
    view_seed: Annotated[int, typer.Option(help="Seed of the augmentation.")] = 0,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Fill every N-th part of the cache only; several such processes fill it "
            "together. Without it, torchrun's or a Slurm array's variables decide.",
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Here, or as tasks on a Ray cluster."),
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, such as auto or ray://host:10001.")
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Ray tasks at a time; 0 for one per GPU, or per two CPUs.")
    ] = 0,
    on_bad_image: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="What to do with an image that cannot be read."),
    ] = "stop",
    device: DeviceOption = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Start although the disk looks too small.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Run a frozen detector over a dataset once and keep what it saw.

    The same command goes on where a stopped one left off.

    The work can be divided: see --part, and docs/scale.md.

    Example:
    mfdetr extract --weights PekingU/rtdetr_r50vd --images val2017
    --annotations annotations/instances_val2017.json --cache val2017.zarr
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.extract import run_extract

    from mfdetr_cache.detectors.options import DetectorOptions
    from mfdetr_cache.extraction.cluster import Cluster
    from mfdetr_cache.extraction.config import ExtractConfig

    config = ExtractConfig(
        detector=detector,
        weights=weights,
        images=images,
        annotations=annotations,
        cache=cache,
        limit=limit,
        device=device,
        options=DetectorOptions(num_queries, encoder_layer, not no_backbone_stride8),
        preset=dtype,
        compression=compression,
        c1=c1,
        roi_size=roi_size,
        roi_sampling_ratio=roi_sampling_ratio,
        views=views,
        policy=view_policy,
        view_seed=view_seed,
        on_bad_image=on_bad_image,
        force=force,
        partition=parse_partition(part),
        engine=engine,
        cluster=Cluster(address, workers),
    )
    summary = run_extract(config, ConsoleReporter())
    share = summary.detector_seconds / summary.seconds if summary.num_extracted else 0.0
    facts = {
        "cache id": summary.cache_id,
        "images": f"{summary.num_images} ({summary.num_extracted} extracted now)",
        "size": f"{human_bytes(summary.stored_bytes)} "
        f"({summary.raw_bytes / max(summary.stored_bytes, 1):.2f} x smaller than float16)",
        "time": f"{human_time(summary.seconds)}, {100 * share:.0f} % of it in the detector",
    }
    if summary.skipped:
        names = ", ".join(str(s["image_id"]) for s in summary.skipped[:10])
        facts["skipped"] = f"{len(summary.skipped)} images: {names}"
    print_facts(f"Cache {cache}", facts)
    if summary.box is not None:
        box = summary.box.to_dict()
        print_table("What is cached, in percent", ["", *box], metric_rows({"box": box}))
    if summary.parts_missing:
        typer.echo(
            f"{summary.parts_missing} parts of the cache are not there yet; when the other "
            f"processes are done: mfdetr cache finish {cache}"
        )
    write_json(json, {**asdict(summary), "cache": str(cache)})
