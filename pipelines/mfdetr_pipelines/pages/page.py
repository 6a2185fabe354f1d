"""A self-contained HTML page: sections of text, tables, charts and captioned images."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from PIL import Image

from mfdetr_cache.files import WRITTEN_BY, require_free

# Height of a stored image in pixels; shown at 180, and larger when it is clicked.
_STORED_HEIGHT = 480

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("mfdetr_pipelines.pages", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True, slots=True)
class Panel:
    """An image with a short title.

    Attributes:
        smooth: Interpolate when enlarged, as for photographs; cells of a map stay sharp.
    """

    title: str
    image: Image.Image
    smooth: bool = True

    @property
    def data(self) -> str:
        """The image as base64 of a JPEG."""
        width = max(1, round(self.image.width * _STORED_HEIGHT / self.image.height))
        how = Image.Resampling.BICUBIC if self.smooth else Image.Resampling.NEAREST
        out = io.BytesIO()
        self.image.convert("RGB").resize((width, _STORED_HEIGHT), how).save(out, "JPEG", quality=85)
        return base64.b64encode(out.getvalue()).decode()


@dataclass(frozen=True, slots=True)
class PanelRow:
    """Images side by side, with a title; they wrap in a narrow window."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a page; its non-empty fields are shown in this order.

    Attributes:
        charts: SVG elements.
        notes: Bullet points.
    """

    heading: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    charts: Sequence[str] = ()
    columns: Sequence[str] = ()
    cells: Sequence[Sequence[str]] = ()
    text: str = ""
    notes: Sequence[str] = ()
    rows: Sequence[PanelRow] = ()


def html_page(title: str, sections: Sequence[Section]) -> str:
    """A self-contained HTML page for light and dark mode."""
    template = _TEMPLATES.get_template("page.html.jinja")
    return template.render(title=title, sections=sections, written_by=WRITTEN_BY)


def require_page_place(path: Path, option: str) -> None:
    """Refuse a place for a page where there is anything but a page of ours; OutputError."""
    require_free(path, option, f'content="{WRITTEN_BY}"'.encode())
