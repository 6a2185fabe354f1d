"""What the documents say is what the code does."""

import ast
import json
import re
import shlex
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import zarr
from mfdetr_cli.app import app
from mfdetr_pipelines.ablation.comparison import paper_table
from mfdetr_pipelines.extract import run_extract

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.synthetic import draw_scene
from mfdetr_cache.demo import demo_detector, demo_head
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.recipes import asked_recipe
from tests.support.scenes import extract_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/history.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def fenced(path: Path) -> list[str]:
    return re.findall(r"^```[a-z]*\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    found = []
    for document in DOCUMENTS:
        for block in fenced(document):
            joined = block.replace("\\\n", " ")
            found += [line.strip() for line in joined.splitlines() if line.startswith("mfdetr ")]
    return list(dict.fromkeys(found))


def parse(line: str) -> dict[str, object]:
    """Parse a command line without running it; unknown options raise."""
    command: Any = typer.main.get_command(app)
    arguments = shlex.split(line.split(" # ")[0])[1:]
    while hasattr(command, "get_command"):
        context = command.make_context("mfdetr", [arguments[0]], resilient_parsing=True)
        found = command.get_command(context, arguments.pop(0))
        assert found is not None, line
        command = found
    return command.make_context(command.name, arguments).params


@pytest.mark.parametrize("line", commands())
def test_documented_commands_exist_with_these_options(line: str) -> None:
    parameters = parse(line)
    assignments = dict(a.split("=", 1) for a in parameters.get("set_") or [])  # type: ignore[attr-defined]
    named = parameters.get("recipe") or ()
    for recipe in [named] if isinstance(named, str) else named:  # type: ignore[attr-defined]
        asked_recipe(str(recipe), assignments)
    if parameters.get("table"):
        paper_table(int(str(parameters["table"])))


def test_there_are_documented_commands() -> None:
    assert len(commands()) >= 6


def anchors(path: Path) -> set[str]:
    """Of its headings, as GitHub makes them; the site's are checked by ``make docs``."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    plain = (re.sub(r"\]\(.*?\)|[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = document.parent / target if target else document
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("target", ["test", "check", "demo", "fmt", "docs"])
def test_make_targets_exist(target: str) -> None:
    finished = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("preset", ["fp16", "int8", "int8-small", "int4"])
def test_the_format_page_reads_a_cache(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, preset: str
) -> None:
    """The reading example of docs/cache-format.md, run as it stands."""
    path = tmp_path / "c.zarr"
    config = extract_config(scenes_folder, str(rtdetr_folder), path, preset=preset, limit=4)
    run_extract(config, SilentReporter())
    code = next(b for b in fenced(ROOT / "docs/cache-format.md") if "zarr.open_group" in b)
    names: dict[str, object] = {"row": 3}
    exec(code.replace('"val2017.zarr"', repr(str(path))), names)
    wanted = FeatureCache.open(path).read(3).maps["c1"].to_array()
    # The page multiplies and adds in the same order, in float32: equal to the last bit.
    assert np.array_equal(np.asarray(names["cells"]), wanted)


def test_the_format_page_lists_every_array(drawn_cache: Path) -> None:
    text = (ROOT / "docs/cache-format.md").read_text()
    group = zarr.open_group(str(drawn_cache), mode="r")
    for name, member in group.members(max_depth=None):
        if isinstance(member, zarr.Array):
            assert name.rsplit("/", 1)[-1] in text, name


def strings_of_the_code() -> str:
    """Every text in the code, f-strings with their holes left out."""
    found = []
    for folder in ("mfdetr_cache", "pipelines", "cli"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                    found.append("".join(str(p) for p in parts))
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_exist() -> None:
    """Every quoted message, between its capital placeholders, is a text of the code."""
    texts = strings_of_the_code()
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    messages = [m for row in rows for m in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(messages) > 20
    missing = []
    for message in messages:
        pieces = re.split(r"'X'|s3://|\b[A-Z][A-Z:]*\b|\[?\.\.\.\]?|\(s\)", message)
        words = [p.strip(" ;:[],.") for p in pieces]
        missing += [(message, w) for w in words if len(w) > 3 and w not in texts]
    assert missing == []


def test_the_python_page_runs(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands there, with the demo's detector and head and a drawn cache in place of others.

    Its ONNX example runs beside the export of that model, in tests/pipelines/test_export.py.
    """
    examples = [b for b in fenced(ROOT / "docs/python.md") if "from mfdetr_cache" in b]
    code = "\n".join(examples).replace('"train2017.zarr"', repr(str(drawn_cache)))
    assert '("hdetr_r50.pth", "runs/paper", kind="h-detr-r50")' in code
    code = code.replace(
        '("hdetr_r50.pth", "runs/paper", kind="h-detr-r50")', "(demo_detector(), demo_head())"
    )
    image, _ = draw_scene(3)
    image.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"demo_detector": demo_detector, "demo_head": demo_head}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # supervision speaks of OpenCV
        exec(code, names)
    assert len(names["found"]) >= 1
    assert names["c1"].ndim == 3


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell as they stand, on fewer scenes and steps, where nothing but pip has run."""
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    code, sizes = re.subn(r"(num_train, num_val, steps =) \d+, \d+, \d+", r"\1 4, 3, 2", code)
    assert sizes == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names.get("found", names.get("results"))) >= 1


def test_tests_that_the_reliability_page_names_exist() -> None:
    path, named = "", 0
    for file, test in re.findall(
        r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", (ROOT / "docs/reliability.md").read_text()
    ):
        path = file or path
        if path and (file or test):
            named += 1
            assert f"def {test}" in (ROOT / path).read_text() or not test, f"{path}::{test}"
    assert named > 20
