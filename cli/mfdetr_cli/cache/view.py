from mfdetr_pipelines.cache.view import run_view
from mfdetr_pipelines.config.cache import ViewConfig

from mfdetr_cli.console import print_facts
from mfdetr_cli.output import CommandOutput


def view(config: ViewConfig, out: CommandOutput) -> None:
    """Draw the page."""
    summary = run_view(config, out.reporter)
    document = {"cache": str(config.cache), "page": str(summary.page), "images": summary.images}
    out.write_json(document)
    print_facts(f"Cache {config.cache}", {"page": str(summary.page), "images": str(summary.images)})
