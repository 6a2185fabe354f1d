"""The result of an ablation as Markdown, CSV, JSON and one self-contained page."""

import csv
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from mfdetr_cache.head.folder import write_atomically
from mfdetr_pipelines.ablate import RowResult
from mfdetr_pipelines.ablation_rows import shared_notes

COLUMNS = (
    "row",
    "AP",
    "vs first",
    "AP50",
    "AP75",
    "APS",
    "APM",
    "APL",
    "params M",
    "MACs G",
    "train",
    "images/s",
    "head ms",
    "paper AP",
    "paper params M",
    "paper MACs G",
)


def report_cells(result: RowResult) -> list[str]:
    """One row of the table as text; metrics in percent, a dash where there is nothing.

    Args:
        result: Result of a row.

    Returns:
        Cells in the order of ``COLUMNS``.
    """

    def number(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def percent(name: str) -> str:
        mean = result.mean(name)
        return "-" if mean is None or mean < 0 else f"{100 * mean:.1f}"

    ap, spread = percent("AP"), result.spread()
    if spread is not None:
        ap += f" ± {100 * spread:.1f}"
    cost, paper = result.plan.cost, result.plan.row.paper
    trained = result.train_seconds
    return [
        result.plan.row.name,
        ap,
        _versus(result),
        *(percent(n) for n in ("AP50", "AP75", "APS", "APM", "APL")),
        number(None if cost is None else cost.parameters / 1e6),
        number(None if cost is None else cost.macs / 1e9),
        f"{trained / 60:.1f} min" if trained else "-",
        number(result.images_per_second or None, 1),
        number(result.head_ms or None, 0),
        number(None if paper is None else 100 * paper.metrics.AP, 1),
        number(None if paper is None else paper.params_m),
        number(None if paper is None else paper.macs_g),
    ]


def _versus(result: RowResult) -> str:
    """The difference to the first row in points with its 95 % interval; ~ marks noise."""
    found = result.against_first
    if found is None:
        return "-"
    low, high = 100 * found.low, 100 * found.high
    mark = "~ " if found.is_noise else ""
    return f"{mark}{100 * found.difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def write_report(
    folder: Path, title: str, results: Sequence[RowResult], strips: Sequence[str] = ()
) -> list[Path]:
    """Write all forms of the table.

    Args:
        folder: Where to; made if needed.
        title: What was compared.
        results: One result per row.
        strips: Pictures of sample masks for the page, as data URLs.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "ablation.md": _markdown(title, results),
        "ablation.csv": _csv(results),
        "ablation.json": json.dumps(
            {"title": title, "rows": [r.to_dict() for r in results]}, indent=2
        ),
        "ablation.html": _page(title, results, strips),
    }
    paths = []
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
        paths.append(folder / name)
    return paths


def _problems(results: Sequence[RowResult]) -> list[str]:
    return shared_notes([(r.plan.row.name, r.problem or r.plan.row.note) for r in results])


def _markdown(title: str, results: Sequence[RowResult]) -> str:
    lines = [f"# {title}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(report_cells(r)) + " |" for r in results]
    note = "vs first: difference in points with its 95 % interval over images; ~ holds zero."
    lines += ["", note, "", *(f"* {p}" for p in _problems(results))]
    return "\n".join(lines).rstrip() + "\n"


def _csv(results: Sequence[RowResult]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    writer.writerows(report_cells(r) for r in results)
    return out.getvalue()


_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 88rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
.ours { fill: #2b6cb0 } .paper { fill: #cbd5e0 } text { font-size: 13px; fill: #222 }
"""


_LEGEND = (
    "AP and its parts in percent, ± one standard deviation over seeds. <b>vs first</b>: difference "
    "to the first row in points, with the 95 % interval of a paired bootstrap over images; ~ where "
    "the interval holds zero."
)


def _page(title: str, results: Sequence[RowResult], strips: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in report_cells(r)) + "</tr>"
        for r in results
    )
    notes = "".join(f"<li>{html.escape(p)}</li>" for p in _problems(results))
    samples = "".join(
        f"<p><img src='{s}' alt='annotation, then the masks of each row'>" for s in strips
    )
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{_bars(results)}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table><p>{_LEGEND}</p><ul>{notes}</ul>{samples}"
    )


def _bars(results: Sequence[RowResult]) -> str:
    """Mask AP as bars with one standard deviation, the paper's in grey below."""
    scale, left, step = 6.0, 220, 44
    parts = []
    for index, result in enumerate(results):
        y, mean, paper = index * step, result.mean(), result.plan.row.paper
        name = html.escape(result.plan.row.name)
        parts.append(f"<text x='{left - 8}' y='{y + 18}' text-anchor='end'>{name}</text>")
        if mean is not None:
            width = 100 * mean * scale
            parts.append(
                f"<rect class='ours' x='{left}' y='{y + 4}' width='{width:.1f}' height='16'/>"
                f"<text x='{left + width + 8:.1f}' y='{y + 17}'>{report_cells(result)[1]}</text>"
            )
            spread = 100 * (result.spread() or 0.0) * scale
            parts.append(
                f"<path d='M{left + width - spread:.1f} {y + 12}h{2 * spread:.1f}' stroke='#222'/>"
            )
        if paper is not None:
            width = 100 * paper.metrics.AP * scale
            parts.append(
                f"<rect class='paper' x='{left}' y='{y + 22}' width='{width:.1f}' height='10'/>"
                f"<text x='{left + width + 8:.1f}' y='{y + 32}'>paper "
                f"{100 * paper.metrics.AP:.1f}</text>"
            )
    height = step * len(results)
    return f"<svg width='700' height='{height}' role='img'>{''.join(parts)}</svg>"
