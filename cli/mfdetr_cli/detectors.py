"""``mfdetr detectors``."""

from dataclasses import asdict

from mfdetr_cli.console import print_table, write_json
from mfdetr_cli.options import JsonOption


def detectors(json: JsonOption = None) -> None:
    """List the detectors that can be frozen.

    Example:
    mfdetr detectors
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_cache.detectors.registry import list_detectors

    listed = list_detectors()
    rows = [[d.name, d.model, d.weights, d.encoder_maps, d.checked] for d in listed]
    columns = ["--detector", "model", "--weights", "encoder maps", "checked against"]
    print_table("Detectors", columns, rows, justify="left")
    write_json(json, {"detectors": [asdict(d) for d in listed]})
