from dataclasses import asdict

from mfdetr_pipelines.config.export import ExportConfig
from mfdetr_pipelines.export import run_export

from mfdetr_cli.console import human_bytes, print_facts
from mfdetr_cli.output import CommandOutput


def export(config: ExportConfig, out: CommandOutput) -> None:
    """Write the graph, and show its inputs and outputs."""
    summary = run_export(config, out.reporter)
    out.write_json(asdict(summary))
    shapes = {**summary.inputs, **summary.outputs}
    facts = {"size": human_bytes(summary.num_bytes)}
    facts |= {name: " x ".join(shape) for name, shape in shapes.items()}
    facts["against torch"] = f"{summary.largest_difference:.1e} of the largest value"
    print_facts(f"Written {config.out}", facts)
