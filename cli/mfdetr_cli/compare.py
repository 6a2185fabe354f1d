"""``mfdetr compare``."""

from pathlib import Path

from mfdetr_pipelines.compare import run_compare
from mfdetr_pipelines.config.compare import CompareConfig

from mfdetr_cli.console import metric_rows, print_table
from mfdetr_cli.json_file import write_json
from mfdetr_cli.progress import ConsoleReporter


def compare(config: CompareConfig, json: Path | None) -> None:
    """Measure, and show every subject beside the first."""
    summary = run_compare(config, ConsoleReporter())
    rows = [s.to_dict() for s in summary.subjects]
    write_json(json, {"num_images": summary.num_images, "subjects": rows})
    for kind in ("mask", "boundary"):
        metrics = {s.name: getattr(s, kind).to_dict() for s in summary.subjects}
        columns = ["", *next(iter(metrics.values()))]
        title = f"{kind.capitalize()} AP on {summary.num_images} images, in percent"
        cells = metric_rows(metrics)
        if kind == "mask":
            columns.insert(2, "vs first")
            for line, subject in zip(cells, summary.subjects, strict=True):
                line.insert(2, str(subject.against_first or "-"))
        print_table(title, columns, cells)
