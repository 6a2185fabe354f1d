"""A self-contained HTML page: one style, rows of captioned pictures, nothing fetched."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

# How high a panel is shown, in CSS pixels; it is stored larger, for screens with small pixels.
_SHOWN_HEIGHT = 180
_STORED_HEIGHT = 320

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222 }
body { margin: 0 auto; padding: 1.5rem; max-width: 90rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
td:not(:first-child) { white-space: nowrap }
.facts th, .facts td { padding: .15rem .8rem .15rem 0; text-align: left; border: 0 }
.scroll { overflow-x: auto }
.row { display: flex; flex-wrap: wrap; gap: .6rem; margin: .3rem 0 1.4rem }
figure { margin: 0; width: min-content } figcaption { color: #555; font-size: 13px }
figure img { display: block; height: HEIGHTpx }
h3 { font-size: 15px; margin: 0 } svg { max-width: 100%; height: auto }
.bar { fill: #2b6cb0 } .paper { fill: #cbd5e0 } svg text { font-size: 13px; fill: #222 }
""".replace("HEIGHT", str(_SHOWN_HEIGHT))


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of a row.

    Attributes:
        title: What it shows, a few words.
        picture: The picture, of any size.
        smooth: Whether it is a photograph; the cells of a map stay cells.
    """

    title: str
    picture: Image.Image
    smooth: bool = True


@dataclass(frozen=True, slots=True)
class PanelRow:
    """Pictures of one thing beside each other.

    Attributes:
        title: What they are of, such as a file's name.
        panels: The pictures; they wrap where the window is narrow.
    """

    title: str
    panels: tuple[Panel, ...]


def html_page(title: str, body: str) -> str:
    """A whole page.

    Args:
        title: Its heading, as plain text.
        body: HTML below the heading.

    Returns:
        HTML that needs nothing but itself.
    """
    heading = html.escape(title)
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{heading}</title><style>{_STYLE}</style><h1>{heading}</h1>{body}</html>\n"
    )


def panel_rows(rows: Sequence[PanelRow]) -> str:
    """Rows of pictures as HTML.

    Args:
        rows: The rows.

    Returns:
        HTML with the pictures in it, as JPEG.
    """
    return "".join(
        f"<h3>{html.escape(row.title)}</h3>"
        f"<div class='row'>{''.join(_figure(p) for p in row.panels)}</div>"
        for row in rows
    )


def _figure(panel: Panel) -> str:
    picture, title = panel.picture, html.escape(panel.title)
    size = (max(1, round(picture.width * _STORED_HEIGHT / picture.height)), _STORED_HEIGHT)
    how = Image.Resampling.BICUBIC if panel.smooth else Image.Resampling.NEAREST
    out = io.BytesIO()
    picture.convert("RGB").resize(size, how).save(out, "JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode()
    return (
        f"<figure><img src='data:image/jpeg;base64,{data}' alt='{title}'>"
        f"<figcaption>{title}</figcaption></figure>"
    )
