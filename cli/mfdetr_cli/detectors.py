"""``mfdetr detectors``."""

from dataclasses import asdict

from mfdetr_cache.detectors.registry import list_detectors
from mfdetr_cli.console import print_table, write_json
from mfdetr_cli.options import JsonOption


def detectors(json: JsonOption = None) -> None:
    """List the detectors that can be frozen.

    Example:
    mfdetr detectors
    """
    listed = list_detectors()
    rows = [[d.name, d.model, d.weights, d.encoder_maps, d.checked] for d in listed]
    columns = ["--detector", "model", "--weights", "encoder maps", "checked against"]
    print_table("Detectors", columns, rows, justify="left")
    write_json(json, {"detectors": [asdict(d) for d in listed]})
