"""``mfdetr evaluate``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mfdetr_cli.console import (
    ConsoleReporter,
    human_time,
    print_evaluation,
    print_facts,
    write_json,
)
from mfdetr_cli.options import DeviceOption, JsonOption


def evaluate(
    cache: Annotated[Path, typer.Option(help="Cache of the split to measure on.")],
    head: Annotated[Path, typer.Option(help="Run folder of train-head.")],
    baselines: Annotated[
        bool, typer.Option(help="Also measure the floor and the ceiling of these detections.")
    ] = True,
    results: Annotated[
        Path | None, typer.Option(help="Write the masks as a COCO results file.")
    ] = None,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Measure COCO mask AP of a head, with the detector's box AP and the bounds beside it.

    Example:
    mfdetr evaluate --cache val2017.zarr --head runs/fast --json fast.json
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.evaluate import EvaluateConfig, run_evaluate

    config = EvaluateConfig(cache, head, device, baselines, results)
    summary = run_evaluate(config, ConsoleReporter())
    metrics = summary.metrics()
    print_evaluation(f"{cache}, in percent", metrics)
    head_ms = 1000 * summary.head_seconds / max(summary.num_images, 1)
    print_facts(
        "",
        {
            "images": f"{summary.num_images} in {human_time(summary.seconds)}",
            "mask network": f"{head_ms:.0f} ms per image",
        },
    )
    write_json(json, {**asdict(summary), **metrics, "cache": str(cache), "head": str(head)})
