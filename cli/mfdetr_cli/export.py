"""``mfdetr export``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mfdetr_cache.errors import ConfigError
from mfdetr_cli.console import ConsoleReporter, human_bytes, print_facts, write_json
from mfdetr_cli.options import JsonOption


def export(
    head: Annotated[Path, typer.Option(help="Run folder of train-head.")],
    out: Annotated[Path, typer.Option(help="The ONNX file.")] = Path("head.onnx"),
    weights: Annotated[
        str | None, typer.Option(help="Put the detector into the graph too: its weights.")
    ] = None,
    detector: Annotated[str, typer.Option(help="See: mfdetr detectors.")] = "hf",
    input_size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Network input in pixels; the graph is for this size."),
    ] = None,
    top_k: Annotated[
        int, typer.Option(help="With the detector: masks for so many of the best queries.")
    ] = 100,
    json: JsonOption = None,
) -> None:
    """Write a head, or detector and head together, as ONNX, checked against torch.

    The number of regions is free, the input size is fixed, one image at a time.

    Example:
    mfdetr export --head runs/fast --weights PekingU/rtdetr_r50vd --out model.onnx
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_pipelines.export import ExportConfig, run_export

    size = None
    if input_size is not None:
        height, _, width = input_size.lower().partition("x")
        if not height.isdigit() or not width.isdigit():
            raise ConfigError(f"--input-size {input_size!r}: write HxW, such as 640x640")
        size = (int(height), int(width))
    config = ExportConfig(head, out, size, weights, detector, top_k)
    summary = run_export(config, ConsoleReporter())
    shapes = {**summary.inputs, **summary.outputs}
    facts = {"size": human_bytes(summary.num_bytes)}
    facts |= {name: " x ".join(shape) for name, shape in shapes.items()}
    facts["against torch"] = f"{summary.largest_difference:.1e} of the largest value"
    print_facts(f"Written {out}", facts)
    write_json(json, {**asdict(summary), "out": str(out)})
