"""``mfdetr cache``."""

from pathlib import Path
from typing import Annotated

import typer
from mfdetr_pipelines.cache_info import describe_cache

from mfdetr_cli.console import human_bytes, print_facts, print_table, write_json
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
    about = describe_cache(cache)
    whole = (
        "complete" if about.complete else f"{about.parts_missing} of {about.parts} parts missing"
    )
    facts = {
        "cache id": about.cache_id,
        "format": f"version {about.format_version}, maps as {about.preset}",
        "detector": f"{about.detector}, weights {about.weights_sha256[:16]}",
        "dataset": f"{about.dataset}, annotations {about.annotations_sha256[:16]}",
        "images": f"{about.images} of {about.rows} ({len(about.skipped)} skipped), "
        f"{about.objects} objects",
        "state": whole,
        "size": f"{human_bytes(about.stored_bytes)}, {human_bytes(about.bytes_per_image)} each, "
        f"{about.ratio:.2f} x smaller than uncompressed",
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
