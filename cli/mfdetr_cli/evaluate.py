"""``mfdetr evaluate``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

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
from mfdetr_cli.options import (
    DeviceOption,
    JsonOption,
    LocalCacheOption,
    LocalCacheSizeOption,
    storage_at,
)


def evaluate(
    cache: Annotated[str | None, typer.Option(help="Cache of the split to measure on.")] = None,
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
            metavar="RULE",
            help="Class score times predicted IoU (iou, Eq. 13), times mean probability (mean, "
            "Eq. 2), or alone (class); auto is iou where the head predicts it, else mean.",
        ),
    ] = "auto",
    no_baselines: Annotated[
        bool,
        typer.Option(
            "--no-baselines", help="Leave out the floor and the ceiling of these detections."
        ),
    ] = False,
    no_boundary: Annotated[
        bool, typer.Option("--no-boundary", help="Leave out boundary AP.")
    ] = False,
    oracles: Annotated[
        bool,
        typer.Option(
            "--oracles",
            help="Show what AP would be if masks, scores, boxes, labels or the missing "
            "objects were perfect.",
        ),
    ] = False,
    per_category: Annotated[
        bool, typer.Option("--per-category", help="Show the AP of every category.")
    ] = False,
    evaluator: Annotated[
        Literal["fast", "pycocotools"],
        typer.Option(help="Who computes AP; both give the same numbers."),
    ] = "fast",
    weights: Annotated[
        str | None, typer.Option(help="Time the detector too: its weights, with --images.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder, for --weights.")] = None,
    save_results: Annotated[
        Path | None, typer.Option(help="Write the masks as a COCO results file.")
    ] = None,
    local_cache: LocalCacheOption = None,
    local_cache_size: LocalCacheSizeOption = "100GB",
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Measure COCO mask AP of a head, with the detector's box AP and the bounds beside it.

    Example:
    mfdetr evaluate --cache val2017.zarr --head runs/fast --json fast.json
    """
    if results is not None:
        if oracles:
            raise ConfigError("--oracles needs --cache and --head: it runs the head again")
        if annotations is None or cache is not None or head is not None:
            raise ConfigError("--results FILE goes with --annotations FILE, and without --cache")
        from mfdetr_pipelines.evaluate_results import run_evaluate_results

        found = run_evaluate_results(results, annotations, evaluator, boundary=not no_boundary)
        title = f"{found.num_results} results on {found.num_images} images, in percent"
        document = {"num_images": found.num_images, "num_results": found.num_results}
        _show(title, found.metrics(), found.details(), per_category=per_category)
        details = found.details()
        write_json(
            json, {**document, **found.metrics(), "details": details, "results": str(results)}
        )
        return
    if cache is None or head is None:
        raise ConfigError("give --cache and --head, or --results and --annotations")
    if (weights is None) != (images is None):
        raise ConfigError("--weights and --images go together: they time the live detector")
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.evaluate import EvaluateConfig, run_evaluate

    from mfdetr_cache.evaluation.oracles import ORACLES

    live = None if weights is None or images is None else (weights, images)
    config = EvaluateConfig(
        storage_at(cache, local_cache, local_cache_size),
        head,
        device,
        not no_baselines,
        save_results,
        score,
        which,
        evaluator,
        not no_boundary,
        live,
        oracles,
    )
    summary = run_evaluate(config, ConsoleReporter())
    metrics = summary.metrics()
    _show(f"{cache}, in percent", metrics, summary.details, per_category=per_category)
    if summary.oracles:
        rows = {f"+ {ORACLES[name]}": m.to_dict() for name, m in summary.oracles.items()}
        rows = {"as it is": summary.mask.to_dict(), **rows}
        columns = list(summary.mask.to_dict())
        print_table("Mask AP, if only this were perfect", ["", *columns], metric_rows(rows))
    parts = summary.details.get("held_out")
    facts = {"images": f"{summary.num_images} in {human_time(summary.seconds)}"}
    facts["mask network"] = (
        f"{summary.parameters / 1e6:.2f} M, {summary.macs / 1e9:.1f} G MACs at 800x1124"
    )
    if parts is not None:
        seen, unseen = (f"{100 * parts[k]:.1f}" for k in ("seen_AP", "unseen_AP"))
        facts["categories"] = f"mask AP {seen} of those seen in training, {unseen} of the others"
    for name, latency in summary.latency.items():
        median, p90 = 1000 * latency.median, 1000 * latency.p90
        facts[name.replace("_", "-")] = f"{median:.0f} ms per image (median), {p90:.0f} ms (p90)"
    print_facts("", facts)
    write_json(json, {**asdict(summary), **metrics, "cache": str(cache), "head": str(head)})


def _show(
    title: str,
    metrics: dict[str, dict[str, float] | None],
    details: dict[str, Any],
    *,
    per_category: bool,
) -> None:
    """Tables: metrics, recalls, and the categories if asked for."""
    print_evaluation(title, metrics)
    details = {name: details[name] for name in ("mask", "box") if name in details}
    recalls = {name: found["recall"] for name, found in details.items()}
    columns = list(next(iter(recalls.values())))
    print_table("Average recall", ["", *columns], metric_rows(recalls))
    if not per_category:
        return
    names = list(details)
    lists = [details[name]["categories"] for name in names]
    rows = [
        [same[0]["name"], str(same[0]["objects"])]
        + [f"{100 * c[key]:.1f}" for c in same for key in ("AP", "AP50")]
        for same in zip(*lists, strict=True)
        if same[0]["objects"]
    ]
    heads = [f"{name} {key}" for name in names for key in ("AP", "AP50")]
    print_table("Categories", ["", "objects", *heads], rows)
