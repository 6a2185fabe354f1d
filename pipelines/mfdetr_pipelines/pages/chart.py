"""Charts in one style, as SVG for pages and Markdown and as PDF; among them that of a training."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mfdetr_cache.files import write_atomically
from mfdetr_cache.training.run_log import read_log

# Text and lines; in an SVG they take the colour of the page around them.
INK = "#222222"
MEASURED = "#0072b2"
PUBLISHED = "#999999"  # what was not measured here, readable on white and on black
_STYLE: dict[Any, Any] = {
    "font.size": 9.75,  # 13 pixels of a page
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
    # Text stays text, in the reader's font; a paper's PDF needs TrueType.
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    # The same figure is the same file.
    "svg.hashsalt": "mfdetr",
    # Names are no formulas.
    "text.parse_math": False,
}
_SVG_STYLE = "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"

CURVES_FILE = "curves.svg"
_LOSSES = {
    "bce": "cross-entropy",
    "dice": "dice",
    "scoring": "predicted IoU",
    "box_loss": "boxes",
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn figure."""

    figure: Figure

    def to_svg(self) -> str:
        """A standalone SVG element, reproducible byte by byte."""
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with rc_context(_STYLE):
            self.figure.savefig(out, format="svg", metadata=nothing)
        svg = out.getvalue()
        # Without the XML prolog, and without names of groups, which several charts of one page
        # would share.
        svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :]).replace(INK, "currentColor")
        start = svg.index(">") + 1
        return svg[:start] + _SVG_STYLE + svg[start:]

    def to_pdf(self) -> bytes:
        """A PDF of one page, reproducible byte by byte."""
        out = io.BytesIO()
        with rc_context(_STYLE):
            self.figure.savefig(out, format="pdf", metadata={"CreationDate": None})
        return out.getvalue()


def draw(plot: Callable[[Axes], None], width: float, height: float) -> Chart:
    """A chart with a transparent background; sizes in inches of 96 pixels."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        plot(figure.add_subplot())
    return Chart(figure)


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    labels: Sequence[str],
    spreads: Sequence[float] | None = None,
) -> None:
    """Horizontal bars from top to bottom, with names on the left and labels on the right.

    Bars of NaN are left out; ``spreads`` are half lengths of error bars.
    """
    positions = range(len(names))
    drawn = axes.barh(positions, values, 0.5, xerr=spreads, ecolor=INK)
    axes.bar_label(drawn, labels, padding=4)
    axes.set_yticks(positions, names)
    axes.tick_params(length=0)
    # Every bar has its number; an axis would say it again.
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.margins(y=0)
    axes.invert_yaxis()


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
