"""Charts of an ablation: a bar for every row, and mask AP over label fractions."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from mfdetr_pipelines.ablation.comparison import PublishedSystem
from mfdetr_pipelines.ablation.result import RowResult
from mfdetr_pipelines.pages.chart import MEASURED, PUBLISHED, Chart, bars, draw


def ap_bars(results: Sequence[RowResult]) -> Chart:
    """Mask AP of every row with one standard deviation over seeds; the paper's in grey below."""
    names = [r.row.name for r in results]
    means = [_percent(r.mean()) for r in results]
    spreads = [_percent(r.spread()) for r in results]
    published = [_percent(r.row.paper.AP) for r in results]

    def plot(axes: Axes) -> None:
        bars(axes, names, means, list(map(_label, means, spreads)), spreads)
        below = axes.barh([i + 0.36 for i in range(len(names))], published, 0.2, color=PUBLISHED)
        texts = ["" if math.isnan(p) else f"paper {p:.1f}" for p in published]
        axes.bar_label(below, texts, padding=4)

    return draw(plot, 8, 0.3 + len(results) * (0.3 if all(map(math.isnan, published)) else 0.42))


def hours_chart(results: Sequence[RowResult], published: Sequence[PublishedSystem]) -> Chart:
    """Mask AP over hours of training: measured rows in colour, published systems in grey.

    Hours of a measured row are its total, if the detector's are known, else those of its training
    on the machine at hand; those of the others are V100 hours.
    """

    def plot(axes: Axes) -> None:
        for system in published:
            if system.hours is not None:
                _point(
                    axes, system.hours, system.AP, f"{system.system} {system.backbone}", PUBLISHED
                )
        for result in results:
            hours = result.total_hours or result.train_seconds / 3600
            if result.seeds and hours:
                _point(axes, hours, _percent(result.mean()), result.row.name, MEASURED)
        axes.set_xscale("log")
        axes.set_xlabel("hours: published on a V100 (grey), measured here")
        axes.set_ylabel("mask AP")

    return draw(plot, 8, 4)


def _point(axes: Axes, hours: float, ap: float, name: str, colour: str) -> None:
    axes.plot([hours], [ap], "o", color=colour)
    axes.annotate(name, (hours, ap), (4, 4), textcoords="offset points", size="small")


def label_curves(results: Sequence[RowResult]) -> Chart | None:
    """Mask AP over the fraction of labelled images, one line per head; None without fractions.

    Error bars are one standard deviation over seeds.
    """
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for result in results:
        if result.row.curve and result.seeds:
            spread = result.spread() or 0.0
            point = (result.row.recipe.train.label_fraction, _percent(result.mean()))
            curves.setdefault(result.row.curve, []).append((*point, 100 * spread))
    curves = {name: sorted(points) for name, points in curves.items() if len(points) > 1}
    if not curves:
        return None

    def plot(axes: Axes) -> None:
        for name, points in curves.items():
            seen, means, spreads = zip(*points, strict=True)
            (line,) = axes.plot(seen, means, marker="o", markersize=4, label=name)
            low = [m - s for m, s in zip(means, spreads, strict=True)]
            high = [m + s for m, s in zip(means, spreads, strict=True)]
            axes.fill_between(seen, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        # Logarithmic: the question is what ten times the masks bring.
        axes.set_xscale("log")
        fractions = sorted({f for points in curves.values() for f, _, _ in points})
        axes.set_xticks(fractions, [f"{100 * f:g} %" for f in fractions])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=PUBLISHED, alpha=0.3)
        axes.set_xlabel("images whose masks were seen")
        axes.set_ylabel("mask AP, one standard deviation over seeds")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    return draw(plot, 8, 3.6)


def _percent(value: float | None) -> float:
    """Percent; NaN, which matplotlib leaves out, for None."""
    return math.nan if value is None else 100 * value


def _label(mean: float, spread: float) -> str:
    if math.isnan(mean):
        return ""
    return f"{mean:.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")
