"""What the site has beside docs/*.md; a hook of MkDocs, see mkdocs.yml."""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

# What are pages of the site beside docs/*.md: path in the repository, page.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/history.md": "history.md",
    "docs/notebook-masks.ipynb": "notebook-masks.md",
    "docs/notebook-ablation.ipynb": "notebook-ablation.md",
}
# Pages of reference, written from docstrings: page, title, module.
REFERENCE = (
    ("model", "Model", "mfdetr_cache.model"),
    ("recipes", "Recipes", "mfdetr_cache.training.recipes"),
    ("head-settings", "Settings of the head", "mfdetr_cache.head.config"),
    ("training-settings", "Settings of the training", "mfdetr_cache.training.config"),
    ("cache", "Cache", "mfdetr_cache.cache.reader"),
    ("detectors", "Detectors", "mfdetr_cache.detectors.protocol"),
    ("datasets", "Datasets", "mfdetr_cache.coco.annotations"),
    ("scoring", "Scores", "mfdetr_cache.evaluation.scoring"),
    ("metrics", "Metrics", "mfdetr_cache.evaluation.coco_metrics"),
    ("types", "Data types", "mfdetr_cache.types"),
    ("errors", "Errors", "mfdetr_cache.errors"),
)
_LINK = re.compile(r"\[([^\]\[]*)\]\(([^)\s]+)\)")


def _as_page(notebook: Path) -> str:
    """The cells of a notebook as Markdown, below a link to itself."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    parts.insert(1, f'<a href="{notebook.name}">This page as a notebook</a>')
    return "\n\n".join(parts)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files beside docs/, the notebooks and the pages of reference."""
    for source, page in PAGES.items():
        path = ROOT / source
        is_notebook = path.suffix == ".ipynb"
        text = _as_page(path) if is_notebook else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page, title, module in REFERENCE:
        text = f"# {title}\n\n`{module}`\n\n::: {module}\n"
        files.append(File.generated(config, f"api/{page}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the repository, made those of the site.

    A link to a file that is no page, such as a module, becomes its text; one to a file that is not
    there stays as it is, and the build fails on it.
    """
    del config
    uri = page.file.src_uri
    source = next((s for s, p in PAGES.items() if p == uri), f"docs/{uri}")

    def in_site(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, hash_, anchor = target.partition("#")
        # Pages with links lie side by side; those of reference, below api/, have none.
        if "://" in path or not path or uri.startswith("api/"):
            return found[0]
        named = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        inside = PAGES.get(named, named.removeprefix("docs/"))
        if files.get_file_from_path(inside) is None:
            return text if (ROOT / named).exists() else found[0]
        return f"[{text}]({inside}{hash_}{anchor})"

    return _LINK.sub(in_site, markdown)
