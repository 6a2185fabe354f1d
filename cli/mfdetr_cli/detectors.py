"""``mfdetr detectors``."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from mfdetr_cli.console import print_table, write_json
from mfdetr_cli.options import JsonOption

if TYPE_CHECKING:
    from mfdetr_cache.detectors.registry import DetectorListing


def detectors(json: JsonOption = None) -> None:
    """List the detectors that can be frozen.

    Example:
    mfdetr detectors
    """
    # torch takes seconds to import; --help and a mistyped option need not wait for it.
    from mfdetr_cache.detectors.registry import list_detectors

    listed = list_detectors()
    notes = list(dict.fromkeys(d.checked for d in listed))
    official = [d for d in listed if d.weights == "official .pth"]
    print_table(
        "--detector NAME --weights FILE.pth, as the authors publish it",
        ["NAME", "strides", "width", "queries", "C1", "paper tables", "checked"],
        [[d.name, d.levels, d.width, d.queries, d.c1, d.paper, _mark(d, notes)] for d in official],
        justify="left",
    )
    print_table(
        "--detector hf --weights FOLDER_OR_HUB_ID, of transformers",
        ["model", "encoder maps", "C1", "checked"],
        [[d.model, d.encoder_maps, d.c1, _mark(d, notes)] for d in listed if d.name == "hf"],
        justify="left",
    )
    plugins = [d for d in listed if d.name != "hf" and d not in official]
    if plugins:
        rows = [[d.name, d.model, _mark(d, notes)] for d in plugins]
        print_table("--detector NAME, of other packages", ["NAME", "model", "checked"], rows)
    typer.echo("Checked against")
    for number, note in enumerate(notes):
        typer.echo(f" {_letter(number)}  {note}")
    write_json(json, {"detectors": [asdict(d) for d in listed]})


def _mark(listing: "DetectorListing", notes: Sequence[str]) -> str:
    return _letter(notes.index(listing.checked))


def _letter(number: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[number]
