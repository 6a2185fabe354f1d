from dataclasses import asdict

from mfdetr_pipelines.config.fit import FitConfig
from mfdetr_pipelines.fit import FitSummary, run_fit

from mfdetr_cli.console import human_bytes, human_time, print_facts, print_lines, print_metrics
from mfdetr_cli.extract import print_categories
from mfdetr_cli.output import CommandOutput


def fit(config: FitConfig, out: CommandOutput) -> None:
    """Go the whole way, and say what came of it."""
    show(run_fit(config, out.reporter), out)


def show(summary: FitSummary, out: CommandOutput) -> None:
    """Say what came of it, where to look and how to go on."""
    result = summary.evaluation
    metrics = result.metrics()
    about = {k: v for k, v in asdict(summary).items() if k != "evaluation"}
    out.write_json({**asdict(result), **metrics, **about})
    print_categories(summary.categories)
    print_metrics(f"{result.num_images} images not learned from, in percent", metrics)
    facts = {step: human_time(seconds) for step, seconds in summary.seconds.items()}
    facts["in all"] = human_time(sum(summary.seconds.values()))
    print_facts("What it took", {**facts, "caches": human_bytes(summary.cache_bytes)})
    print_facts("Look at", {"page": str(summary.page), "pictures": str(summary.pictures[0].parent)})
    print_lines("next:", *(f"  {command}" for command in summary.next_commands))
