from dataclasses import asdict

from mfdetr_pipelines.config.train_joint import TrainJointConfig
from mfdetr_pipelines.train_joint import run_train_joint

from mfdetr_cli.console import human_time, is_first_process, print_facts, print_metrics
from mfdetr_cli.output import CommandOutput


def train_joint(config: TrainJointConfig, out: CommandOutput) -> None:
    """Train, and show what to extract with and what the validation gave."""
    summary = run_train_joint(config, out.reporter)
    if not is_first_process():
        return
    metrics = None if summary.validation is None else summary.validation.metrics()
    measured = metrics and {kind: metrics[kind] for kind in ("mask", "box")}
    out.write_json({**asdict(summary), "validation": measured})
    parameters = summary.tuned_parameters / 1e6
    print_facts(
        f"Run {config.out}",
        {
            "tuned": f"{config.tune}, {parameters:.1f} M parameters of {config.detector}",
            "trained": f"{summary.steps} steps in {human_time(summary.seconds)}, "
            f"{summary.images_per_second:.2f} images/s",
            "losses": f"masks {summary.mask_loss:.3f}, boxes {summary.box_loss:.3f} (last steps)",
            "extract with": f"--detector {config.detector} --weights {summary.weights}",
        },
    )
    if metrics is not None:
        print_metrics("Validation, in percent", metrics)
