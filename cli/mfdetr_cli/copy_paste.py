"""``mfdetr copy-paste``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mfdetr_cli.console import ConsoleReporter, print_facts, write_json
from mfdetr_cli.options import JsonOption


def copy_paste(
    images: Annotated[Path, typer.Option(help="Image folder of the training split.")],
    annotations: Annotated[Path, typer.Option(help="Its COCO instances JSON.")],
    out: Annotated[Path, typer.Option(help="New folder for images and annotations.")],
    copies: Annotated[
        int, typer.Option(help="Pictures to make of every image, beside itself.")
    ] = 6,
    seed: Annotated[int, typer.Option(help="Of what is pasted, and where.")] = 0,
    json: JsonOption = None,
) -> None:
    """Make a larger training set: every image, and copies with objects of others on it.

    For some hundred images. What comes out is a dataset in COCO format, for mfdetr extract.

    Example:
    mfdetr copy-paste --images coco/train2017
    --annotations coco/annotations/instances_train2017.json --out pasted --copies 6
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.copy_paste import CopyPasteConfig, run_copy_paste

    config = CopyPasteConfig(images, annotations, out, copies, seed)
    summary = run_copy_paste(config, ConsoleReporter())
    print_facts(
        f"Dataset {out}",
        {
            "images": f"{summary.num_images}, {summary.num_objects} objects",
            "extract with": f"--images {summary.images} --annotations {summary.annotations}",
        },
    )
    places = {"images": str(summary.images), "annotations": str(summary.annotations)}
    write_json(json, {**asdict(summary), **places})
