"""``mfdetr copy-paste``."""

from dataclasses import asdict
from pathlib import Path

from mfdetr_pipelines.config.copy_paste import CopyPasteConfig
from mfdetr_pipelines.copy_paste import run_copy_paste

from mfdetr_cli.console import print_facts, print_next
from mfdetr_cli.json_file import write_json
from mfdetr_cli.progress import ConsoleReporter


def copy_paste(config: CopyPasteConfig, json: Path | None) -> None:
    """Make the dataset, and say what extracts it."""
    summary = run_copy_paste(config, ConsoleReporter())
    paths = {"images": str(summary.images), "annotations": str(summary.annotations)}
    write_json(json, {**asdict(summary), **paths})
    print_facts(
        f"Dataset {config.out}",
        {"images": f"{summary.num_images}, {summary.num_objects} objects"},
    )
    files = ("--images", summary.images, "--annotations", summary.annotations)
    print_next(("extract", "--weights", "DETECTOR", *files, "--views", 1, "--cache", "pasted.zarr"))
