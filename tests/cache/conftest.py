"""A cache of seven images in two views, of which one is skipped."""

from pathlib import Path

import pytest

from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.types import DetectorSpec
from tests.support.filled_caches import SIZES, fill, make_content
from tests.support.images import make_spec


@pytest.fixture
def spec() -> DetectorSpec:
    return make_spec(strides=(8, 16, 64), backbone8=True)


@pytest.fixture
def content(spec: DetectorSpec) -> CacheContent:
    return make_content(spec, SIZES)


@pytest.fixture
def filled(tmp_path: Path, content: CacheContent) -> Path:
    fill(tmp_path / "c.zarr", content, SIZES)
    return tmp_path / "c.zarr"
