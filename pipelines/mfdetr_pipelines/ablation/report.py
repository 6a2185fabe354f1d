"""The result of an ablation as Markdown, CSV, JSON, a self-contained page and figures."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mfdetr_cache.files import require_free, write_atomically
from mfdetr_pipelines.ablation.charts import ap_bars, hours_chart, label_curves
from mfdetr_pipelines.ablation.paper_tables import PUBLISHED_COLUMNS, PublishedSystem
from mfdetr_pipelines.ablation.plan import MACS_SIZE, shared_notes
from mfdetr_pipelines.ablation.result import RowResult
from mfdetr_pipelines.pages.page import PanelRow, Section, html_page, require_page_place

_PAGE = "ablation.html"
_BESIDE = (
    *("ablation.md", "ablation.csv", "ablation.json", "ablation.pdf"),
    *("labels.svg", "labels.pdf", "hours.pdf"),
)
COLUMNS = (
    "row",
    "AP",
    "vs first",
    "AP50",
    "AP75",
    "APS",
    "APM",
    "APL",
    "boundary AP",
    "box AP",
    "params M",
    f"MACs G, {MACS_SIZE}",
    "train min",
    "images/s",
    "head ms",
    "total h",
    "paper AP",
    "paper params M",
    f"paper MACs G, {MACS_SIZE}",
)


def report_cells(result: RowResult) -> list[str]:
    """The cells of a row in the order of ``COLUMNS``; metrics in percent, a dash for none."""

    def number(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def percent(name: str) -> str:
        mean = result.mean(name)
        return "-" if mean is None or mean < 0 else f"{100 * mean:.1f}"

    mask_ap, spread = percent("AP"), result.spread()
    if spread is not None:
        mask_ap += f" ± {100 * spread:.1f}"
    cost, paper = result.plan.cost, result.plan.row.paper
    trained = result.train_seconds
    return [
        result.plan.row.name,
        mask_ap,
        "-" if result.against_first is None else str(result.against_first),
        *(percent(n) for n in ("AP50", "AP75", "APS", "APM", "APL")),
        *(number(None if ap is None else 100 * ap, 1) for ap in (result.boundary, result.box)),
        number(None if cost is None else cost.parameters / 1e6),
        number(None if cost is None else cost.macs / 1e9),
        f"{trained / 60:.1f}" if trained else "-",
        number(result.images_per_second or None, 1),
        number(result.head_ms or None, 0),
        number(result.total_hours, 1),
        number(None if paper is None or paper.AP is None else 100 * paper.AP, 1),
        number(None if paper is None else paper.params_m),
        number(None if paper is None else paper.macs_g),
    ]


def require_report_place(folder: Path) -> None:
    """Refuse a folder where a report would be written over files of somebody else; OutputError."""
    require_page_place(folder / _PAGE, "--out")
    # The page says whose it is, the others cannot.
    if not (folder / _PAGE).exists():
        for name in _BESIDE:
            require_free(folder / name, "--out")


def write_report(
    folder: Path,
    title: str,
    results: Sequence[RowResult],
    samples: Sequence[PanelRow] = (),
    published: Sequence[PublishedSystem] = (),
) -> list[Path]:
    """Write the table in all forms and its charts as PDF; returns the files.

    With label fractions there is a curve too, as SVG for the Markdown and as PDF. ``published``
    systems come in a table of their own, and beside the rows in a chart of AP against hours.
    """
    bars, curves = ap_bars(results), label_curves(results)
    document = {"title": title, "rows": [r.to_dict() for r in results]}
    charts = [bars.to_svg()]
    files = {
        "ablation.md": _markdown(title, results, with_curves=curves is not None).encode(),
        "ablation.csv": _csv(results).encode(),
        "ablation.json": json.dumps(document, indent=2).encode(),
        "ablation.pdf": bars.to_pdf(),
    }
    if curves is not None:
        charts.append(curves.to_svg())
        files |= {"labels.svg": charts[1].encode(), "labels.pdf": curves.to_pdf()}
    if published:
        hours = hours_chart(results, published)
        charts.append(hours.to_svg())
        files["hours.pdf"] = hours.to_pdf()
        files["ablation.md"] += _markdown_table(PUBLISHED_COLUMNS, _published(published)).encode()
        document["published"] = [asdict(p) for p in published]
        files["ablation.json"] = json.dumps(document, indent=2).encode()
    # First: the others are taken for ours where it is there.
    write_atomically(folder / _PAGE, _page(title, results, charts, samples, published).encode())
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in (*files, _PAGE)]


def _problems(results: Sequence[RowResult]) -> list[str]:
    return shared_notes([(r.plan.row.name, r.problem or r.plan.row.note) for r in results])


def _filled(results: Sequence[RowResult]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells without empty columns."""
    cells = [report_cells(r) for r in results]
    kept = [i for i, name in enumerate(COLUMNS) if i < 2 or any(c[i] != "-" for c in cells)]
    return [COLUMNS[i] for i in kept], [[c[i] for i in kept] for c in cells]


def _markdown(title: str, results: Sequence[RowResult], *, with_curves: bool) -> str:
    lines = [f"# {title}", _markdown_table(*_filled(results))]
    note = "vs first: difference in points with its 95 % interval over images; ~ holds zero."
    curves = ["![mask AP against label fraction](labels.svg)", ""] if with_curves else []
    lines += [note, "", *curves, *(f"* {p}" for p in _problems(results))]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *cells]
    return "\n" + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _published(published: Sequence[PublishedSystem]) -> list[list[str]]:
    """Cells, the best last."""
    return [p.cells() for p in sorted(published, key=lambda p: p.AP)]


def _csv(results: Sequence[RowResult]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    writer.writerows(report_cells(r) for r in results)
    return out.getvalue()


_LEGEND = (
    "AP and its parts in percent, ± one standard deviation over seeds. vs first: difference to the "
    "first row in points, with the 95 % interval of a paired bootstrap over images; ~ where the "
    "interval holds zero."
)


def _page(
    title: str,
    results: Sequence[RowResult],
    charts: Sequence[str],
    samples: Sequence[PanelRow],
    published: Sequence[PublishedSystem],
) -> str:
    columns, cells = _filled(results)
    table = Section(
        charts=charts[:1], columns=columns, cells=cells, text=_LEGEND, notes=_problems(results)
    )
    masks = [Section("Masks of the first seed", rows=samples)] if samples else []
    others = Section(
        "Published, not measured here",
        columns=PUBLISHED_COLUMNS if published else (),
        cells=_published(published),
    )
    return html_page(
        title, [table, Section(charts=charts[1:]), *([others] if published else []), *masks]
    )
