from mfdetr_pipelines.config.demo import DemoConfig
from mfdetr_pipelines.demo import run_demo

from mfdetr_cli.fit import show
from mfdetr_cli.output import CommandOutput


def demo(config: DemoConfig, out: CommandOutput) -> None:
    """Go the whole way, and say what came of it and where to look."""
    show(run_demo(config.out, out.reporter), out)
