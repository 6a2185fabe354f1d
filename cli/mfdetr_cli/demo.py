"""``mfdetr demo``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mfdetr_cli.console import (
    ConsoleReporter,
    human_bytes,
    human_time,
    print_evaluation,
    print_facts,
    write_json,
)
from mfdetr_cli.options import JsonOption


def demo(
    out: Annotated[Path, typer.Option(help="Where data, caches, head and pictures go.")] = Path(
        "mfdetr-demo"
    ),
    json: JsonOption = None,
) -> None:
    """Go the whole way on a drawn dataset: extract, train, evaluate, pictures. Needs no network.

    Example:
    mfdetr demo --out mfdetr-demo
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.demo import run_demo

    summary = run_demo(out, ConsoleReporter())
    result = summary.evaluation
    metrics = result.metrics()
    title = f"{result.num_images} scenes nobody trained on, in percent"
    print_evaluation(title, metrics)
    total = sum(summary.seconds.values())
    facts = {stage: human_time(s) for stage, s in summary.seconds.items()}
    facts |= {"in all": human_time(total), "caches": human_bytes(summary.cache_bytes)}
    print_facts("What it took", facts)
    print_facts("Look at", {p.name: str(p) for p in summary.pictures})
    document: dict[str, object] = {**asdict(result), **metrics, "seconds": summary.seconds}
    write_json(json, {**document, "pictures": [str(p) for p in summary.pictures]})
