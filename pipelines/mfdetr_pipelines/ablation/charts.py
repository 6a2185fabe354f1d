"""Charts of an ablation as SVG: a bar for every row, and mask AP over label fractions."""

import html
import math
from collections.abc import Sequence

from mfdetr_pipelines.ablation.run import RowResult

_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")
# About how wide a letter of the labels is, in pixels at 13 pixels a line.
_LETTER = 7.2


def ap_bars(results: Sequence[RowResult]) -> str:
    """Mask AP of every row with one standard deviation over seeds, the paper's in grey below.

    Args:
        results: One result per row.

    Returns:
        SVG.
    """
    step, length = 44, 560
    left = 16 + _LETTER * max((len(r.plan.row.name) for r in results), default=0)
    papers = [r.plan.row.paper for r in results]
    largest = max(
        [(r.mean() or 0.0) + (r.spread() or 0.0) for r in results]
        + [p.metrics.AP for p in papers if p is not None]
        + [0.01]
    )
    scale = length / largest
    parts = []
    for index, (result, paper) in enumerate(zip(results, papers, strict=True)):
        y, mean = index * step, result.mean()
        name = html.escape(result.plan.row.name)
        parts.append(f"<text x='{left - 8:.0f}' y='{y + 18}' text-anchor='end'>{name}</text>")
        if mean is not None:
            width, spread = mean * scale, (result.spread() or 0.0) * scale
            parts.append(
                f"<rect class='bar' fill='{_COLOURS[0]}' x='{left:.0f}' y='{y + 4}' "
                f"width='{width:.1f}' height='16'/>"
                f"<path d='M{left + width - spread:.1f} {y + 12}h{2 * spread:.1f}' stroke='#222'/>"
                f"<text x='{left + width + spread + 8:.1f}' y='{y + 17}'>{_percent(result)}</text>"
            )
        if paper is not None:
            width = paper.metrics.AP * scale
            parts.append(
                f"<rect class='paper' fill='#cbd5e0' x='{left:.0f}' y='{y + 22}' "
                f"width='{width:.1f}' height='10'/>"
                f"<text x='{left + width + 8:.1f}' y='{y + 32}'>paper "
                f"{100 * paper.metrics.AP:.1f}</text>"
            )
    return _svg(left + length + 110, step * len(results), parts)


def label_curves(results: Sequence[RowResult]) -> str:
    """Mask AP against the part of the images whose masks were seen, with one standard deviation.

    Args:
        results: One result per row; those of ``--label-fraction`` are drawn, a line per head.

    Returns:
        SVG; empty where no head was trained on several fractions.
    """
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for result in results:
        mean = result.mean()
        if result.plan.row.curve and mean is not None:
            fraction = result.plan.row.recipe.train.label_fraction
            points = curves.setdefault(result.plan.row.curve, [])
            points.append((fraction, 100 * mean, 100 * (result.spread() or 0.0)))
    curves = {name: sorted(points) for name, points in curves.items() if len(points) > 1}
    if not curves:
        return ""
    left, top, width, height = 50, 16, 560, 300
    fractions = sorted({x for points in curves.values() for x, _, _ in points})
    largest = max(y + s for points in curves.values() for _, y, s in points)
    tick = next(t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if largest / t <= 8)
    end = tick * math.ceil(max(largest, tick) / tick)

    def x_of(fraction: float) -> float:
        # Logarithmic: the question is what ten times the masks bring.
        part = math.log(fraction / fractions[0]) / math.log(fractions[-1] / fractions[0])
        return left + 14 + part * (width - 28)

    def y_of(percent: float) -> float:
        return top + height * (1 - percent / end)

    parts = [f"<rect x='{left}' y='{top}' width='{width}' height='{height}' fill='#f7fafc'/>"]
    for number in range(round(end / tick) + 1):
        y = y_of(number * tick)
        parts.append(
            f"<path d='M{left} {y:.1f}h{width}' stroke='#e2e8f0'/>"
            f"<text x='{left - 6}' y='{y + 4:.1f}' text-anchor='end'>{number * tick:g}</text>"
        )
    parts += [
        f"<text x='{x_of(f):.1f}' y='{top + height + 18}' text-anchor='middle'>{100 * f:g} %</text>"
        for f in fractions
    ]
    parts.append(
        f"<text x='{left + width / 2}' y='{top + height + 38}' text-anchor='middle'>"
        "images whose masks were seen</text>"
        f"<text x='{left}' y='11'>mask AP, one standard deviation over seeds</text>"
    )
    for (name, points), y in zip(
        curves.items(), _apart([y_of(p[-1][1]) for p in curves.values()]), strict=True
    ):
        colour = _COLOURS[list(curves).index(name) % len(_COLOURS)]
        upper = [f"{x_of(f):.1f},{y_of(p + s):.1f}" for f, p, s in points]
        lower = [f"{x_of(f):.1f},{y_of(p - s):.1f}" for f, p, s in reversed(points)]
        line = " ".join(f"{x_of(f):.1f},{y_of(p):.1f}" for f, p, _ in points)
        parts.append(
            f"<polygon points='{' '.join(upper + lower)}' fill='{colour}' opacity='0.2'/>"
            f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='2'/>"
        )
        parts += [
            f"<circle cx='{x_of(f):.1f}' cy='{y_of(p):.1f}' r='3.5' fill='{colour}'>"
            f"<title>{html.escape(name)}, {100 * f:g} %: {p:.1f} ± {s:.1f}</title></circle>"
            for f, p, s in points
        ]
        parts.append(
            f"<text x='{left + width + 8}' y='{y + 4:.1f}' style='fill:{colour}'>"
            f"{html.escape(name)}</text>"
        )
    names = _LETTER * max(len(name) for name in curves)
    return _svg(left + width + 16 + names, top + height + 46, parts)


def _apart(heights: Sequence[float], least: float = 16) -> list[float]:
    """Heights of labels, moved down where two would lie on one another."""
    moved = [0.0] * len(heights)
    last = -math.inf
    for index in sorted(range(len(heights)), key=lambda i: heights[i]):
        last = max(heights[index], last + least)
        moved[index] = last
    return moved


def _percent(result: RowResult) -> str:
    mean, spread = result.mean(), result.spread()
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f"width='{width:.0f}' height='{height:.0f}' viewBox='0 0 {width:.0f} {height:.0f}'"
    # The font stands here too: the picture is used outside the page.
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img' "
        f"font-family='system-ui, sans-serif' font-size='13' fill='#222'>{''.join(parts)}</svg>"
    )
