"""``mfdetr cache``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mfdetr_cache.errors import CheckFailedError
from mfdetr_cli.console import (
    ConsoleReporter,
    counted,
    human_bytes,
    metric_rows,
    print_facts,
    print_table,
    write_json,
)
from mfdetr_cli.options import CacheArgument, DeviceOption, JsonOption

cache_app = typer.Typer(no_args_is_help=True, help="Look after feature caches.")


@cache_app.callback()
def _group() -> None:
    """Look after feature caches."""


@cache_app.command()
def info(
    cache: CacheArgument,
    json: JsonOption = None,
) -> None:
    """Tell what a cache is, what made it, how large it is and whether it is whole.

    Example:
    mfdetr cache info val2017.zarr
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.cache.info import describe_cache

    about = describe_cache(cache)
    whole = (
        "complete" if about.complete else f"{about.parts_missing} of {about.parts} parts missing"
    )
    facts = {
        "cache id": about.cache_id,
        "format": f"version {about.format_version}, maps as {about.preset}, {about.compression}",
        "detector": f"{about.detector}, weights {about.weights_sha256[:16]}",
        "dataset": f"{about.dataset}, annotations {about.annotations_sha256[:16]}",
        "images": f"{about.images} of {about.rows} ({len(about.skipped)} skipped), "
        f"{about.objects} objects",
        "views": ", ".join(about.views),
        "state": whole,
        "size": f"{human_bytes(about.stored_bytes)}, {human_bytes(about.bytes_per_image)} each, "
        f"{about.ratio:.2f} x smaller than float16",
    }
    for found in about.certificates:
        facts[f"certified {found.head[:8]}"] = (
            f"mask AP {100 * found.AP:.2f}, {100 * found.AP_reference:.2f} on {found.reference} "
            f"features: {100 * found.difference:+.2f} "
            f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
        )
    for skip in about.skipped[:10]:
        facts[f"skipped {skip['image_id']}"] = str(skip["reason"])
    print_facts(f"Cache {cache}", facts)
    rows = [
        [
            a.name.removesuffix("/values"),
            a.shape,
            a.dtype,
            human_bytes(a.stored_bytes),
            f"{a.share:.1%}",
            a.source,
        ]
        for a in about.arrays
    ]
    columns = ["array", "per image", "type", "stored", "share", "source"]
    print_table("What is stored", columns, rows)
    write_json(json, about.to_dict())


@cache_app.command()
def verify(
    cache: CacheArgument,
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte and compare its checksum.")
    ] = False,
    live: Annotated[int, typer.Option(help="Run the detector again on N images and compare.")] = 0,
    weights: Annotated[str | None, typer.Option(help="The detector, for --live.")] = None,
    images: Annotated[Path | None, typer.Option(help="The images, for --live.")] = None,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Check that a cache is whole. Exit code 1 names what is broken; nothing is changed.

    Looks at sizes and shard indexes, with --full at every checksum, with --live at the detector.

    Example:
    mfdetr cache verify val2017.zarr --full
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.cache.verify import LiveSource, run_verify

    source = LiveSource(weights, images, device) if weights and images else None
    summary = run_verify(cache, ConsoleReporter(), full=full, live=live, source=source)
    write_json(json, {"cache": str(cache), **asdict(summary)})
    for fault in summary.faults[:20]:
        typer.echo(fault)
    if summary.faults:
        raise CheckFailedError(
            f"{cache}: {counted(len(summary.faults), 'fault')}, {len(summary.broken_parts)} of "
            f"{counted(summary.parts, 'part')} broken; mend them with: mfdetr cache repair {cache}"
        )
    how = "every byte read" if full else "sizes and indexes; --full reads every byte"
    facts = {
        "whole": f"{counted(summary.parts, 'part')}, {human_bytes(summary.bytes_checked)} ({how})"
    }
    if summary.live_images:
        facts["live"] = (
            f"{summary.live_images} images as the detector gives them now, largest mean "
            f"difference {summary.live_difference:.1e} of a map's spread"
        )
    print_facts(f"Cache {cache}", facts)


@cache_app.command()
def view(
    cache: CacheArgument,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("cache.html"),
    images: Annotated[
        Path | None, typer.Option(help="Image folder; without it, boxes stand on grey.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many images.")] = 6,
    json: JsonOption = None,
) -> None:
    """Draw a page of what is in a cache: detections, maps as colours, histograms, sizes.

    Example:
    mfdetr cache view val2017.zarr --images val2017 --out val2017.html
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.cache.show import run_view

    summary = run_view(cache, out, ConsoleReporter(), images=images, count=count)
    print_facts(f"Cache {cache}", {"page": str(summary.page), "images": str(summary.images)})
    write_json(json, {"cache": cache, "page": str(summary.page), "images": summary.images})


@cache_app.command()
def finish(
    cache: CacheArgument,
    json: JsonOption = None,
) -> None:
    """Say whether a cache that several processes fill is whole, and which parts are missing.

    Exit code 1 names them. When nothing is missing, shows the box AP of what is cached, as extract
    does. Parts need no merging: each is whole from the moment its manifest is there.

    Example:
    mfdetr cache finish train2017.zarr
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.cache.finish import run_finish

    found = run_finish(cache, ConsoleReporter())
    write_json(json, {"cache": cache, **asdict(found)})
    if found.missing:
        for line in found.missing[:20]:
            typer.echo(line)
        raise CheckFailedError(
            f"{cache}: {found.parts_missing} of {found.parts} parts are missing; run the "
            "processes that fill them again"
        )
    assert found.box is not None
    box = found.box.to_dict()
    print_table("What is cached, in percent", ["", *box], metric_rows({"box": box}))


@cache_app.command()
def repair(
    cache: CacheArgument,
    weights: Annotated[str, typer.Option(help="The detector it was made with.")],
    images: Annotated[Path, typer.Option(help="Its image folder.")],
    annotations: Annotated[Path, typer.Option(help="Its annotation file.")],
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Extract again what is broken or missing, and nothing else.

    Example:
    mfdetr cache repair val2017.zarr --weights PekingU/rtdetr_r50vd --images val2017
    --annotations annotations/instances_val2017.json
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.cache.repair import run_repair

    summary = run_repair(cache, weights, images, annotations, ConsoleReporter(), device=device)
    write_json(json, {"cache": str(cache), **asdict(summary)})
    for fault in summary.faults[:20]:
        typer.echo(fault)
    if not summary.whole:
        raise CheckFailedError(f"{cache} still has faults; see: mfdetr cache verify --full {cache}")
    mended = "nothing was broken"
    if summary.faults:
        mended = (
            f"{counted(len(summary.parts), 'part')} extracted again "
            f"({counted(summary.num_images, 'image')}), "
            f"{counted(summary.foundation_files, 'file')} of the foundation rewritten"
        )
    print_facts(f"Cache {cache}", {"whole": mended})


@cache_app.command()
def certify(
    cache: CacheArgument,
    head: Annotated[Path, typer.Option(help="Run folder of a trained head.")],
    reference: Annotated[
        str | None, typer.Option(help="A cache of the same images with finer features.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Compare with the live detector instead: its weights.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Its image folder.")] = None,
    samples: Annotated[int, typer.Option(help="Bootstrap samples.")] = 1000,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Measure what a preset costs in mask AP, and keep the result in the cache.

    Example:
    mfdetr cache certify val-int8.zarr --head runs/paper --reference val-fp16.zarr
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.cache.certify import CertifyConfig, run_certify
    from mfdetr_pipelines.cache.verify import LiveSource

    source = LiveSource(weights, images, device) if weights and images else None
    config = CertifyConfig(cache, head, reference, source, samples, device)
    found = run_certify(config, ConsoleReporter())
    print_facts(
        f"Cache {cache}",
        {
            f"AP on {found.reference}": f"{100 * found.AP_reference:.2f}",
            f"AP on {found.preset}": f"{100 * found.AP:.2f}",
            "difference": f"{100 * found.difference:+.2f}, 95 % interval "
            f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}] over {found.images} images",
        },
    )
    write_json(json, {"cache": str(cache), **asdict(found)})


@cache_app.command()
def bench(
    cache: CacheArgument,
    images: Annotated[int, typer.Option(help="How many random images are read.")] = 64,
    json: JsonOption = None,
) -> None:
    """Measure how fast a cache is read on this disk, beside a plain read of the same bytes.

    Example:
    mfdetr cache bench train2017.zarr
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.cache.bench import run_bench

    found = run_bench(cache, ConsoleReporter(), images=images)
    rows = [
        [
            s.what,
            str(s.threads),
            "cold" if s.cold else "warm",
            f"{s.images_per_second:.1f}",
            f"{s.megabytes_per_second:.0f}",
        ]
        for s in sorted(found.speeds, key=lambda s: (s.cold, s.threads, s.what))
    ]
    columns = ["read by", "threads", "from", "images/s", "MB/s"]
    print_table(f"{found.images} images, {human_bytes(found.bytes_per_image)} each", columns, rows)
    print_facts(
        "Against the floor",
        {
            "decoded": f"{found.ratio_decode:.2f} of a plain read and decode, warm",
            "cold": f"{found.ratio_cold:.2f} of a plain read",
            "recommended": f"--set num_threads={found.num_threads}",
        },
    )
    write_json(json, {"cache": str(cache), **asdict(found)})
