"""``mfdetr demo``."""

from dataclasses import asdict
from pathlib import Path

from mfdetr_pipelines.config.demo import DemoConfig
from mfdetr_pipelines.demo import run_demo

from mfdetr_cli.console import (
    human_bytes,
    human_time,
    print_evaluation,
    print_facts,
    write_json,
)
from mfdetr_cli.progress import ConsoleReporter


def demo(config: DemoConfig, json: Path | None) -> None:
    """Go the whole way, and say what came of it and where to look."""
    summary = run_demo(config.out, ConsoleReporter())
    result = summary.evaluation
    metrics = result.metrics()
    document: dict[str, object] = {**asdict(result), **metrics, "seconds": summary.seconds}
    write_json(json, {**document, "pictures": [str(p) for p in summary.pictures]})
    print_evaluation(f"{result.num_images} scenes nobody trained on, in percent", metrics)
    total = sum(summary.seconds.values())
    facts = {stage: human_time(s) for stage, s in summary.seconds.items()}
    facts |= {"in all": human_time(total), "caches": human_bytes(summary.cache_bytes)}
    print_facts("What it took", facts)
    print_facts("Look at", {p.name: str(p) for p in summary.pictures})
