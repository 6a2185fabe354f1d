"""How a training went: its losses and mask AP by step."""

from pathlib import Path

from matplotlib.axes import Axes

from mfdetr_cache.files import write_atomically
from mfdetr_cache.training.run_log import read_log
from mfdetr_pipelines.pages.chart import INK, Chart, draw

CURVES_FILE = "curves.svg"
_LOSSES = {
    "bce": "cross-entropy",
    "dice": "dice",
    "scoring": "predicted IoU",
    "box_loss": "boxes",
}


def curves(folder: Path) -> Chart:
    """The parts of the loss of a run, with mask AP where it was measured on the way."""
    log = read_log(folder)
    measured = [(x["step"], 100 * x["validation"]["mask"]["AP"]) for x in log if "validation" in x]

    def plot(axes: Axes) -> None:
        for name, text in _LOSSES.items():
            points = [(line["step"], line[name]) for line in log if line.get(name)]
            if points:
                axes.plot(*zip(*points, strict=True), label=text)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        if measured:
            right = axes.twinx()
            right.spines["right"].set_visible(True)
            right.set_ylabel("mask AP, percent")
            right.plot(*zip(*measured, strict=True), "o-", color=INK, markersize=3)
            axes.plot([], [], "o-", color=INK, markersize=3, label="mask AP")
        # Too short a run has logged nothing.
        if axes.lines:
            axes.figure.legend(frameon=False, ncols=5, loc="outside upper center")

    return draw(plot, 6, 2.4)


def write_curves(folder: Path) -> None:
    """Draw them into the folder of the run; OutputError if it cannot be written."""
    write_atomically(folder / CURVES_FILE, curves(folder).to_svg().encode())
