"""``mfdetr cache``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mfdetr_cache.errors import CheckFailedError
from mfdetr_cli.console import (
    ConsoleReporter,
    human_bytes,
    print_facts,
    print_table,
    write_json,
)
from mfdetr_cli.options import JsonOption

cache_app = typer.Typer(no_args_is_help=True, help="Look after feature caches.")


@cache_app.callback()
def _group() -> None:
    """Look after feature caches."""


@cache_app.command()
def info(
    cache: Annotated[Path, typer.Argument(help="The cache.")],
    json: JsonOption = None,
) -> None:
    """Tell what a cache is, what made it, how large it is and whether it is whole.

    Example:
    mfdetr cache info val2017.zarr
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.cache_info import describe_cache

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
    cache: Annotated[Path, typer.Argument(help="The cache.")],
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte and compare its checksum.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Check that a cache is whole. Exit code 1 names what is broken; nothing is changed.

    Looks at sizes and shard indexes, with --full at every checksum.

    Example:
    mfdetr cache verify val2017.zarr --full
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.cache_verify import run_verify

    summary = run_verify(cache, ConsoleReporter(), full=full)
    write_json(json, {"cache": str(cache), **asdict(summary)})
    for fault in summary.faults[:20]:
        typer.echo(fault)
    if summary.faults:
        raise CheckFailedError(
            f"{cache}: {len(summary.broken_parts)} of {summary.parts} parts are broken; delete "
            "their manifests (views/base/status/manifest) and run the same extract again"
        )
    how = "every byte read" if full else "sizes and indexes; --full reads every byte"
    print_facts(
        f"Cache {cache}",
        {"whole": f"{summary.parts} parts, {human_bytes(summary.bytes_checked)} ({how})"},
    )
