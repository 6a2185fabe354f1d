from dataclasses import asdict

from mfdetr_pipelines.config.copy_paste import CopyPasteConfig
from mfdetr_pipelines.copy_paste import run_copy_paste

from mfdetr_cli.console import print_facts, print_next
from mfdetr_cli.output import CommandOutput


def copy_paste(config: CopyPasteConfig, out: CommandOutput) -> None:
    """Make the dataset, and say what extracts it."""
    summary = run_copy_paste(config, out.reporter)
    out.write_json(asdict(summary))
    print_facts(
        f"Dataset {config.out}",
        {"images": f"{summary.num_images}, {summary.num_objects} objects"},
    )
    files = ("--images", summary.images, "--annotations", summary.annotations)
    print_next(("extract", "--weights", "DETECTOR", *files, "--views", 1, "--cache", "pasted.zarr"))
