"""``mfdetr evaluate``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from mfdetr_cache.errors import ConfigError
from mfdetr_cli.console import (
    ConsoleReporter,
    human_time,
    metric_rows,
    print_evaluation,
    print_facts,
    print_table,
    write_json,
)
from mfdetr_cli.options import DeviceOption, JsonOption


def evaluate(
    cache: Annotated[Path | None, typer.Option(help="Cache of the split to measure on.")] = None,
    head: Annotated[Path | None, typer.Option(help="Run folder of train-head.")] = None,
    which: Annotated[
        Literal["last", "best"],
        typer.Option(help="Weights of the end of the training, or of its best validation."),
    ] = "last",
    results: Annotated[
        Path | None, typer.Option(help="Measure a COCO results file instead, of any tool.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO instances JSON, for --results.")
    ] = None,
    score: Annotated[
        Literal["auto", "iou", "mean", "class"],
        typer.Option(
            help="Class score times predicted IoU (Eq. 13), times mean probability (Eq. 2), or "
            "alone; auto takes Eq. 13 where the head predicts IoUs."
        ),
    ] = "auto",
    baselines: Annotated[
        bool, typer.Option(help="Also measure the floor and the ceiling of these detections.")
    ] = True,
    save_results: Annotated[
        Path | None, typer.Option(help="Write the masks as a COCO results file.")
    ] = None,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Measure COCO mask AP of a head, with the detector's box AP and the bounds beside it.

    Example:
    mfdetr evaluate --cache val2017.zarr --head runs/fast --json fast.json
    """
    if results is not None:
        _evaluate_file(results, annotations, json, mixed=cache is not None or head is not None)
        return
    if cache is None or head is None:
        raise ConfigError("give --cache and --head, or --results and --annotations")
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.evaluate import EvaluateConfig, run_evaluate

    config = EvaluateConfig(cache, head, device, baselines, save_results, score, which)
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


def _evaluate_file(
    results: Path, annotations: Path | None, json: Path | None, *, mixed: bool
) -> None:
    if annotations is None or mixed:
        raise ConfigError("--results FILE goes with --annotations FILE, and without --cache")
    from mfdetr_pipelines.evaluate_results import run_evaluate_results

    summary = run_evaluate_results(results, annotations)
    metrics = summary.metrics()
    shown = {name: values for name, values in metrics.items() if values is not None}
    columns = list(next(iter(shown.values())))
    title = f"{summary.num_results} results on {summary.num_images} images, in percent"
    print_table(title, ["", *columns], metric_rows(shown))
    write_json(json, {**asdict(summary), **metrics, "results": str(results)})
