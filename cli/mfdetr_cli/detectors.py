import string
from dataclasses import asdict

from mfdetr_pipelines.config.demo import DetectorsConfig

from mfdetr_cache.detectors.registry import list_detectors
from mfdetr_cli.console import print_lines, print_table
from mfdetr_cli.output import CommandOutput


def detectors(_config: DetectorsConfig, out: CommandOutput) -> None:
    """List detectors by what ``--detector`` and ``--weights`` take."""
    listed = list_detectors()
    out.write_json({"detectors": [asdict(d) for d in listed]})
    notes = dict.fromkeys(d.checked for d in listed)
    marks = dict(zip(notes, string.ascii_lowercase, strict=False))
    official = [d for d in listed if d.weights == "official .pth"]
    print_table(
        "--detector NAME --weights FILE.pth, as the authors publish it",
        ["NAME", "strides", "width", "queries", "C1", "paper tables", "checked"],
        [[d.name, d.levels, d.width, d.queries, d.c1, d.paper, marks[d.checked]] for d in official],
        justify="left",
    )
    authors = [d for d in listed if d.weights == "authors' checkpoint"]
    print_table(
        "--detector NAME --weights FILE, as the training of the authors writes it",
        ["NAME", "model", "encoder maps", "C1", "checked"],
        [[d.name, d.model, d.encoder_maps, d.c1, marks[d.checked]] for d in authors],
        justify="left",
    )
    print_table(
        "--detector hf --weights FOLDER_OR_HUB_ID, of transformers",
        ["model", "encoder maps", "C1", "checked"],
        [[d.model, d.encoder_maps, d.c1, marks[d.checked]] for d in listed if d.name == "hf"],
        justify="left",
    )
    torchvision = [d for d in listed if d.name.startswith("torchvision:")]
    print_table(
        "--detector NAME --weights FILE.pth, of torchvision: detections are the queries",
        ["NAME", "strides", "width", "queries", "C1", "checked"],
        [[d.name, d.levels, d.width, d.queries, d.c1, marks[d.checked]] for d in torchvision],
        justify="left",
    )
    listed_above = (*official, *authors, *torchvision)
    plugins = [d for d in listed if d.name != "hf" and d not in listed_above]
    if plugins:
        rows = [[d.name, d.model, marks[d.checked]] for d in plugins]
        print_table("--detector NAME, of other packages", ["NAME", "model", "checked"], rows)
    print_lines("Checked against")
    print_lines(*(f" {mark}  {note}" for note, mark in marks.items()))
