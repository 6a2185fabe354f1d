"""Images that are left out of training to measure on."""

from dataclasses import replace
from pathlib import Path

import pytest

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.errors import CacheError
from tests.support.caches import SKIPPED, fill_part, tiny_content


def test_versions_of_a_picture_are_on_one_side(tmp_path: Path) -> None:
    """As Roboflow names what it augments; measured on one of them, a head would know the others."""
    content = tiny_content()
    names = [f"{name}_jpg.rf.{i:032x}.jpg" for i, name in enumerate("abbac")]
    images = [replace(entry, file_name=n) for entry, n in zip(content.images, names, strict=True)]
    with CacheWriter.open_or_create(tmp_path / "c", replace(content, images=images)) as writer:
        for part in writer.pending_parts():
            fill_part(writer, content, part)
    cache = FeatureCache.open(tmp_path / "c")
    rows = [row for row in range(5) if row != SKIPPED]
    assert list(cache.rows) == rows
    learned, measured = cache.split(2)
    assert measured.rows == tuple(row for row in rows if names[row].startswith("b"))
    assert learned.rows == tuple(row for row in rows if names[row][0] in "ac")
    with pytest.raises(CacheError, match="has 3 images: it cannot keep every 4th"):
        cache.split(4)
