"""The repository speaks of the project alone."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_no_large_files() -> None:
    large = [p.name for p in tracked() if p.exists() and p.stat().st_size > 8 * 2**20]
    assert large == []


def test_library_modules_have_docstrings_and_no_print() -> None:
    for path in tracked():
        if path.suffix == ".py" and "mfdetr_cache" in path.parts and path.exists():
            text = path.read_text()
            if text.strip():
                assert text.startswith('"""'), path
                assert not re.search(r"\bprint\(", text), path
