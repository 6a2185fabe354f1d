from dataclasses import asdict
from pathlib import Path

from mfdetr_pipelines.config.predict import PredictConfig
from mfdetr_pipelines.predict import run_predict

from mfdetr_cli.console import print_table
from mfdetr_cli.output import CommandOutput

_SHOWN = 20


def predict(config: PredictConfig, out: CommandOutput) -> None:
    """Segment, and list the first images."""
    summary = run_predict(config, out.reporter)
    out.write_json(asdict(summary))
    rows = [
        [Path(i.picture).name, str(i.num_objects), f"{i.detector_ms:.0f}", f"{i.head_ms:.0f}"]
        for i in summary.images[:_SHOWN]
    ]
    title = f"{config.out}, {len(summary.images)} images"
    title += f", the first {_SHOWN}" if len(summary.images) > len(rows) else ""
    print_table(title, ["image", "objects", "detector, ms", "head, ms"], rows)
