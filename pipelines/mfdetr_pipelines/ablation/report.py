"""The result of an ablation as Markdown, CSV, JSON, a self-contained page and figures."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mfdetr_cache.files import require_free, write_atomically
from mfdetr_pipelines.ablation.charts import ap_bars, hours_chart, label_curves
from mfdetr_pipelines.ablation.comparison import PublishedSystem, published_table
from mfdetr_pipelines.ablation.plan import MACS_SIZE, shared_notes
from mfdetr_pipelines.ablation.result import RowResult
from mfdetr_pipelines.numbers import number, percent
from mfdetr_pipelines.pages.page import PanelRow, Section, html_page, require_page_place

_PAGE = "ablation.html"
_BESIDE = (
    *("ablation.md", "ablation.csv", "ablation.json", "ablation.pdf"),
    *("labels.svg", "labels.pdf", "hours.pdf"),
)


def report_cells(result: RowResult) -> dict[str, str]:
    """The cells of a row by column; metrics in percent, a dash for none."""
    mask_ap, spread = percent(result.mean()), result.spread()
    if spread is not None:
        mask_ap += f" ± {100 * spread:.1f}"
    cost, paper = result.row.cost, result.row.paper
    return {
        "row": result.row.name,
        "AP": mask_ap,
        "vs first": "-" if result.against_first is None else str(result.against_first),
        **{name: percent(result.mean(name)) for name in ("AP50", "AP75", "APS", "APM", "APL")},
        "boundary AP": percent(result.boundary),
        "box AP": percent(result.box),
        "params M": number(None if cost is None else cost.parameters / 1e6),
        f"MACs G, {MACS_SIZE}": number(None if cost is None else cost.macs / 1e9),
        "train min": number(result.train_seconds / 60 or None, 1),
        "images/s": number(result.images_per_second or None, 1),
        "head ms": number(result.head_ms or None, 0),
        "total h": number(result.total_hours, 1),
        "paper AP": percent(paper.AP),
        "paper params M": number(paper.params_m),
        f"paper MACs G, {MACS_SIZE}": number(paper.macs_g),
    }


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
    if published:
        document["published"] = [asdict(p) for p in published]
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
        files["ablation.md"] += _markdown_table(*published_table(published)).encode()
    # First: the others are taken for ours where it is there.
    write_atomically(folder / _PAGE, _page(title, results, charts, samples, published).encode())
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in (*files, _PAGE)]


def _problems(results: Sequence[RowResult]) -> list[str]:
    return shared_notes([(r.row.name, r.problem or r.row.note) for r in results])


def _filled(results: Sequence[RowResult]) -> tuple[list[str], list[list[str]]]:
    """The columns that some row has, and the cells."""
    cells = [report_cells(r) for r in results]
    kept = [n for n in cells[0] if n in ("row", "AP") or any(c[n] != "-" for c in cells)]
    return kept, [[c[n] for n in kept] for c in cells]


def _markdown(title: str, results: Sequence[RowResult], *, with_curves: bool) -> str:
    lines = [f"# {title}", _markdown_table(*_filled(results))]
    note = "vs first: difference in points with its 95 % interval over images; ~ holds zero."
    curves = ["![mask AP against label fraction](labels.svg)", ""] if with_curves else []
    lines += [note, "", *curves, *(f"* {p}" for p in _problems(results))]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *cells]
    return "\n" + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _csv(results: Sequence[RowResult]) -> str:
    out = io.StringIO()
    cells = [report_cells(r) for r in results]
    writer = csv.DictWriter(out, cells[0])
    writer.writeheader()
    writer.writerows(cells)
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
    sections = [table, Section(charts=charts[1:])]
    if published:
        columns, cells = published_table(published)
        sections.append(Section("Published, not measured here", columns=columns, cells=cells))
    if samples:
        sections.append(Section("Masks of the first seed", rows=samples))
    return html_page(title, sections)
