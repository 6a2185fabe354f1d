from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from mfdetr_pipelines.ablation.charts import ap_bars, label_curves
from mfdetr_pipelines.ablation.comparison import PAPER_TABLES
from mfdetr_pipelines.ablation.report import write_report
from mfdetr_pipelines.ablation.result import RowResult
from mfdetr_pipelines.ablation.rows import (
    AblationRow,
    label_fraction_rows,
)

from mfdetr_cache.evaluation.coco_metrics import CocoMetrics
from tests.support.ablations import rows


def result(row: AblationRow, *percent: float) -> RowResult:
    metrics = tuple(CocoMetrics(p / 100, *([0.0] * 5)) for p in percent)
    return RowResult(row, metrics)


def texts_of(svg: str) -> list[str]:
    return ["".join(t.itertext()) for t in ElementTree.fromstring(svg).findall(".//{*}text")]


def test_a_chart_holds_its_labels_and_a_bar_for_every_row() -> None:
    long = AblationRow(
        "a name that is much longer than a label was allowed to be", rows()[0].recipe
    )
    published = AblationRow("12 epochs", rows()[0].recipe, PAPER_TABLES[10].rows[1].paper)
    failed = RowResult(published, problem="the loss is nan")
    chart = ap_bars([result(long, 20, 22), result(rows()[1], 10), failed])
    assert texts_of(chart.to_svg()) == [
        long.name, "without", "12 epochs", "21.0 ± 1.4", "10.0", "paper 46.0"
    ]  # fmt: skip
    widths = [bar.get_width() for bar in chart.figure.axes[0].patches]
    assert widths == pytest.approx([21, 10, np.nan, np.nan, np.nan, 46.0], nan_ok=True)


def test_charts_are_reproducible_and_take_the_colour_of_their_page() -> None:
    results = [result(row, 5, 7) for row in rows()]
    first, second = ap_bars(results), ap_bars(results)
    assert first.to_svg() == second.to_svg()
    assert first.to_pdf() == second.to_pdf()
    assert first.to_pdf().startswith(b"%PDF")
    labels = ElementTree.fromstring(first.to_svg()).findall(".//{*}text")
    assert all("fill: currentColor" in t.attrib["style"] for t in labels)


def test_label_fractions_are_a_curve(tmp_path: Path) -> None:
    made = label_fraction_rows(rows(), [1, 0.01, 0.1])
    results = [result(row, 5 + i, 7 + i) for i, row in enumerate(made)]
    assert label_curves([result(rows()[0], 20, 22)]) is None
    chart = label_curves(results)
    assert chart is not None
    (axes,) = chart.figure.axes
    # From the fewest masks to the most; 1 % was the second row (AP 7), 10 % the third, all the
    # first.
    first, second = (line.get_xydata() for line in axes.lines)
    assert first == pytest.approx(np.array([[0.01, 7], [0.1, 8], [1, 6]]))
    assert second == pytest.approx(np.array([[0.01, 10], [0.1, 11], [1, 9]]))
    assert axes.get_xscale() == "log"
    texts = texts_of(chart.to_svg())
    assert {"1 %", "10 %", "100 %", "with scoring", "without"} <= set(texts)
    files = write_report(tmp_path, "labels", results)
    assert {"labels.svg", "labels.pdf", "ablation.pdf"} <= {f.name for f in files}
    assert (tmp_path / "labels.svg").read_text() == chart.to_svg()
    assert "![mask AP against label fraction](labels.svg)" in (tmp_path / "ablation.md").read_text()


def test_a_page_escapes_what_it_is_given_and_has_no_name_twice(tmp_path: Path) -> None:
    row = AblationRow("<script>&", rows()[0].recipe, note="<b>")
    made = label_fraction_rows([row, rows()[1]], [0.1, 1])
    write_report(tmp_path, "<i>", [result(r, 5, 6) for r in made])
    page = (tmp_path / "ablation.html").read_text()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "<td>&lt;script&gt;&amp;, 10 % of the masks</td>" in page
    # Charts of one page would share the names of their groups.
    assert page.count("<svg") == 2
    assert "<g id=" not in page
