"""Pages in Chromium, on a telephone and on a screen, by day and by night."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# The page lies in a frame of the wanted width; what it turned out to be replaces all else.
_FRAME = """<!doctype html><iframe width="{width}" height="800" srcdoc="{page}"></iframe><script>
const frame = document.querySelector("iframe")
frame.onload = () => {{
  const inside = frame.contentDocument, all = inside.documentElement
  const seen = {{
    width: all.scrollWidth,
    images: [...inside.images].map(i => i.naturalWidth),
    ink: getComputedStyle(inside.body).color,
    chart_ink: [...inside.querySelectorAll("svg")].map(s => getComputedStyle(s).color),
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
  }}
  document.body.textContent = JSON.stringify(seen)
}}
</script>"""


def look_at(page: str, folder: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """What a page is like in a window so wide; skips the test where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    file = folder / "frame.html"
    file.write_text(_FRAME.format(width=width, page=html.escape(page)))
    shown = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    body = re.search(r"<body>(.*)</body>", shown, re.DOTALL)
    assert body is not None, shown[:2000]
    found: dict[str, Any] = json.loads(html.unescape(body[1]))
    return found


def require_readable(page: str, folder: Path) -> None:
    """Nothing is wider than a telephone, all images load, ink suits the mode, nobody is asked."""
    for width, dark in ((375, True), (1280, False)):
        seen = look_at(page, folder, width, dark=dark)
        assert seen["width"] <= width
        assert all(seen["images"])
        assert seen["requests"] == []
        assert len({seen["ink"]} - {"rgb(0, 0, 0)", "rgb(255, 255, 255)"}) == 0
        assert (seen["ink"] == "rgb(255, 255, 255)") == dark
        assert set(seen["chart_ink"]) <= {"rgb(221, 221, 221)" if dark else "rgb(34, 34, 34)"}
