from dataclasses import asdict

from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.numbers import percent
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cli.console import (
    human_time,
    is_first_process,
    print_facts,
    print_metrics,
    print_next,
)
from mfdetr_cli.output import CommandOutput


def train_head(config: TrainHeadConfig, out: CommandOutput) -> None:
    """Train, and show what it took and what the validation gave."""
    summary = run_train_head(config, out.reporter)
    if not is_first_process():
        return
    metrics = None if summary.validation is None else summary.validation.metrics()
    measured = metrics and {kind: metrics[kind] for kind in ("mask", "box")}
    out.write_json({**asdict(summary), "validation": measured})
    waiting = summary.waiting_seconds / max(summary.seconds, 1e-9)
    facts = {
        "recipe": f"{summary.recipe}, {summary.parameters / 1e6:.2f} M parameters",
        "trained": f"{summary.steps} steps, {summary.epochs:.1f} epochs",
        "time": f"{human_time(summary.seconds)}, {summary.images_per_second:.1f} images/s, "
        f"{100 * waiting:.1f} % waiting for data",
        "loss": f"{summary.loss:.3f} (mean of the last steps)",
    }
    if summary.best_AP is not None and summary.best_step != summary.steps:
        facts["best"] = f"mask AP {percent(summary.best_AP)} at step {summary.best_step}"
    print_facts(f"Head {config.out}", facts)
    if metrics is not None:
        print_metrics("Validation, in percent", metrics)
    print_next(
        ("evaluate", "--cache", config.validation.val_cache or "VAL", "--head", config.out),
        ("predict", "PHOTOS", "--weights", "DETECTOR", "--head", config.out, "--out", "MASKS"),
    )
