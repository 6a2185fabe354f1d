"""``mfdetr cache view``."""

from pathlib import Path

from mfdetr_pipelines.cache.show import run_view
from mfdetr_pipelines.config.cache import ViewConfig

from mfdetr_cli.console import print_facts
from mfdetr_cli.json_file import write_json
from mfdetr_cli.progress import ConsoleReporter


def view(config: ViewConfig, json: Path | None) -> None:
    """Draw the page."""
    summary = run_view(
        config.cache, config.out, ConsoleReporter(), images=config.images, count=config.count
    )
    document = {"cache": str(config.cache), "page": str(summary.page), "images": summary.images}
    write_json(json, document)
    print_facts(f"Cache {config.cache}", {"page": str(summary.page), "images": str(summary.images)})
