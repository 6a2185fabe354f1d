"""Charts in one style, as SVG for pages and Markdown and as PDF."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

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
) -> BarContainer:
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
    return drawn
