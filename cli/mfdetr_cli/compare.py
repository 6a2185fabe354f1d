from dataclasses import asdict

from mfdetr_pipelines.compare import run_compare
from mfdetr_pipelines.config.compare import CompareConfig
from mfdetr_pipelines.numbers import metric_table

from mfdetr_cli.console import print_table
from mfdetr_cli.output import CommandOutput


def compare(config: CompareConfig, out: CommandOutput) -> None:
    """Measure, and show every subject beside the first."""
    summary = run_compare(config, out.reporter)
    out.write_json(asdict(summary))
    for kind in ("mask", "boundary"):
        metrics = {s.name: getattr(s, kind).to_dict() for s in summary.subjects}
        columns, cells = metric_table(metrics)
        title = f"{kind.capitalize()} AP on {summary.num_images} images, in percent"
        if kind == "mask":
            columns.insert(2, "vs first")
            for line, subject in zip(cells, summary.subjects, strict=True):
                line.insert(2, str(subject.against_first or "-"))
        print_table(title, columns, cells)
