"""Charts: one look for all, as SVG for pages and notes, as PDF for papers."""

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
}
_SVG_STYLE = "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn figure."""

    figure: Figure

    def to_svg(self) -> str:
        """An SVG element that stands in a page or alone; the same figure gives the same text."""
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
        """A PDF of one page; the same figure gives the same bytes."""
        out = io.BytesIO()
        with rc_context(_STYLE):
            self.figure.savefig(out, format="pdf", metadata={"CreationDate": None})
        return out.getvalue()


def draw(plot: Callable[[Axes], None], width: float, height: float) -> Chart:
    """Draw a chart.

    Args:
        plot: Draws onto the axes.
        width: In inches; 96 pixels of a page.
        height: In inches.

    Returns:
        The chart, without a background.
    """
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
    """Horizontal bars, the first on top, each with its name before and its label after it.

    Args:
        axes: Where to.
        names: Of each bar.
        values: Lengths; what is not a number has no bar.
        labels: Text after each bar.
        spreads: Half lengths of error bars.

    Returns:
        What was drawn.
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
