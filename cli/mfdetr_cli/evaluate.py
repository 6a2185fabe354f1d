from dataclasses import asdict
from pathlib import Path
from typing import Any

from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.evaluate_results import run_evaluate_results
from mfdetr_pipelines.numbers import percent

from mfdetr_cache.evaluation.measure import EvaluateSummary
from mfdetr_cache.evaluation.oracles import ORACLES
from mfdetr_cli.console import human_time, print_facts, print_metrics, print_table
from mfdetr_cli.output import CommandOutput

_MOST_CONFUSED = 30


def evaluate(config: EvaluateConfig, out: CommandOutput) -> None:
    """Measure a head on a cache, or a results file."""
    if config.file.results is not None and config.file.annotations is not None:
        _evaluate_file(config, config.file.results, config.file.annotations, out)
        return
    summary = run_evaluate(config, out.reporter)
    metrics = summary.metrics()
    paths = {"cache": str(config.cache), "head": str(config.head)}
    out.write_json({**asdict(summary), **metrics, **paths})
    what = f"{config.head} ({config.which} weights, score: {summary.scoring}) on {config.cache}"
    _show(f"{what}, in percent", metrics, summary.details, config)
    if summary.oracles:
        rows = {f"+ {ORACLES[name]}": m.to_dict() for name, m in summary.oracles.items()}
        rows = {"as it is": summary.mask.to_dict(), **rows}
        print_metrics("Mask AP, if only this were perfect", rows)
    print_facts("Cost", _facts(summary))


def _evaluate_file(
    config: EvaluateConfig, results: Path, annotations: Path, out: CommandOutput
) -> None:
    found = run_evaluate_results(
        results,
        annotations,
        config.evaluator,
        out.reporter,
        extras=config.extras,
        on_bad=config.file.on_bad_annotation,
    )
    metrics, details = found.metrics(), found.details()
    counts = {"num_images": found.num_images, "num_results": found.num_results}
    out.write_json({**counts, **metrics, "details": details, "results": str(results)})
    title = f"{found.num_results} results on {found.num_images} images, in percent"
    _show(title, metrics, details, config)


def _facts(summary: EvaluateSummary) -> dict[str, str]:
    facts = {"images": f"{summary.num_images} in {human_time(summary.seconds)}"}
    facts["mask network"] = (
        f"{summary.parameters / 1e6:.2f} M, {summary.macs / 1e9:.1f} G MACs at 800x1124"
    )
    parts = summary.details.get("held_out")
    if parts is not None:
        seen, unseen = (percent(parts[k]) for k in ("seen_AP", "unseen_AP"))
        facts["categories"] = f"mask AP {seen} of those seen in training, {unseen} of the others"
    for name, latency in summary.latency.items():
        median, p90 = 1000 * latency.median, 1000 * latency.p90
        facts[name.replace("_", "-")] = f"{median:.0f} ms per image (median), {p90:.0f} ms (p90)"
    return facts


def _show(
    title: str,
    metrics: dict[str, dict[str, float] | None],
    details: dict[str, Any],
    config: EvaluateConfig,
) -> None:
    """Tables: metrics, recalls, and the confusion and the categories if asked for."""
    print_metrics(title, metrics)
    confusion = details.get("confusion")
    details = {name: details[name] for name in ("mask", "box") if name in details}
    print_metrics("Average recall", {name: found["recall"] for name, found in details.items()})
    if confusion:
        mistakes = [c for c in confusion if c["category"] != c["found_as"]][:_MOST_CONFUSED]
        print_table(
            "Objects taken for others",
            ["", "found as", "objects"],
            [[c["category"], c["found_as"] or "(not found)", str(c["objects"])] for c in mistakes],
        )
    if not config.per_category:
        return
    names = list(details)
    lists = [details[name]["categories"] for name in names]
    rows = [
        [same[0]["name"], str(max(c["objects"] for c in same))]
        + [percent(c[key]) for c in same for key in ("AP", "AP50")]
        for same in zip(*lists, strict=True)
        if any(c["objects"] for c in same)
    ]
    heads = [f"{name} {key}" for name in names for key in ("AP", "AP50")]
    print_table("Categories", ["", "objects", *heads], rows)
