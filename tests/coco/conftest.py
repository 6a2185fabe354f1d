"""Fixtures for tests of datasets."""

from pathlib import Path
from typing import Any

import pytest

from tests.support import scenes


@pytest.fixture
def document(scenes_folder: Path) -> dict[str, Any]:
    return scenes.load_annotations(scenes_folder)
