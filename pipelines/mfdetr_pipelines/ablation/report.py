"""The result of an ablation as Markdown, CSV, JSON and one self-contained page."""

import csv
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from mfdetr_cache.files import write_atomically
from mfdetr_pipelines.ablation.charts import ap_bars, label_curves
from mfdetr_pipelines.ablation.rows import shared_notes
from mfdetr_pipelines.ablation.run import RowResult
from mfdetr_pipelines.html_page import PanelRow, html_page, panel_rows

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
    "train min",
    "images/s",
    "head ms",
    "total h",
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
        f"{trained / 60:.1f}" if trained else "-",
        number(result.images_per_second or None, 1),
        number(result.head_ms or None, 0),
        number(result.total_hours, 1),
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
    folder: Path, title: str, results: Sequence[RowResult], samples: Sequence[PanelRow] = ()
) -> list[Path]:
    """Write all forms of the table.

    Args:
        folder: Where to; made if needed.
        title: What was compared.
        results: One result per row.
        samples: Pictures of sample masks for the page.

    Returns:
        The files; the curve over label fractions, where there is one, as a picture too.
    """
    texts = {
        "ablation.md": _markdown(title, results),
        "ablation.csv": _csv(results),
        "ablation.json": json.dumps(
            {"title": title, "rows": [r.to_dict() for r in results]}, indent=2
        ),
        "ablation.html": _page(title, results, samples),
    }
    if curves := label_curves(results):
        texts["labels.svg"] = curves
    paths = []
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
        paths.append(folder / name)
    return paths


def _problems(results: Sequence[RowResult]) -> list[str]:
    return shared_notes([(r.plan.row.name, r.problem or r.plan.row.note) for r in results])


def _filled(results: Sequence[RowResult]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, without the columns that no row has anything in."""
    cells = [report_cells(r) for r in results]
    kept = [i for i, name in enumerate(COLUMNS) if i < 2 or any(c[i] != "-" for c in cells)]
    return [COLUMNS[i] for i in kept], [[c[i] for i in kept] for c in cells]


def _markdown(title: str, results: Sequence[RowResult]) -> str:
    columns, cells = _filled(results)
    lines = [f"# {title}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(c) + " |" for c in cells]
    note = "vs first: difference in points with its 95 % interval over images; ~ holds zero."
    picture = ["![mask AP against label fraction](labels.svg)", ""] if label_curves(results) else []
    lines += ["", note, "", *picture, *(f"* {p}" for p in _problems(results))]
    return "\n".join(lines).rstrip() + "\n"


def _csv(results: Sequence[RowResult]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    writer.writerows(report_cells(r) for r in results)
    return out.getvalue()


_LEGEND = (
    "AP and its parts in percent, ± one standard deviation over seeds. <b>vs first</b>: difference "
    "to the first row in points, with the 95 % interval of a paired bootstrap over images; ~ where "
    "the interval holds zero."
)


def _page(title: str, results: Sequence[RowResult], samples: Sequence[PanelRow]) -> str:
    columns, cells = _filled(results)
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells
    )
    notes = "".join(f"<li>{html.escape(p)}</li>" for p in _problems(results))
    pictures = f"<h2>Masks of the first seed</h2>{panel_rows(samples)}" if samples else ""
    return html_page(
        title,
        f"{ap_bars(results)}<div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div><p>{_LEGEND}</p><ul>{notes}</ul>"
        f"{label_curves(results)}{pictures}",
    )
