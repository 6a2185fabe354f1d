"""Where a cache can be, and what is there instead."""

import json
import os
from pathlib import Path

import pytest
import zarr

from mfdetr_cache.cache.creation import CacheContent
from mfdetr_cache.cache.foundation import FOUNDATION_KEY
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.errors import CacheError
from mfdetr_cache.files import disk_error
from tests.support.caches import files_of
from tests.support.filled_caches import SIZES, make_content


def test_a_second_writer_is_refused(tmp_path: Path, content: CacheContent) -> None:
    path = tmp_path / "c.zarr"
    with (
        CacheWriter.open_or_create(path, content),
        pytest.raises(CacheError, match="being written by another process"),
    ):
        CacheWriter.open_or_create(path, content)


def test_another_cache_is_not_overwritten(filled: Path, content: CacheContent) -> None:
    before = files_of(filled)
    other = make_content(content.root.spec, SIZES, identity={"detector": {"name": "other"}})
    with pytest.raises(CacheError, match=r"already holds another cache: detector\.name"):
        CacheWriter.open_or_create(filled, other)
    assert files_of(filled) == before


def test_a_users_folder_is_not_touched(tmp_path: Path, content: CacheContent) -> None:
    path = tmp_path / "photos"
    path.mkdir()
    (path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(CacheError, match="exists and is no cache; nothing was touched"):
        CacheWriter.open_or_create(path, content)
    assert files_of(path) == {"holiday.jpg": b"x"}


def test_a_cache_needs_a_place_of_its_own(
    tmp_path: Path, content: CacheContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path(), Path(".."), Path("/")):
        with pytest.raises(CacheError, match="is no new folder, which a cache becomes; name one"):
            CacheWriter.open_or_create(path, content)
    os.mkfifo("pipe")
    with pytest.raises(CacheError, match="pipe exists and is no cache; nothing was touched"):
        CacheWriter.open_or_create(Path("pipe"), content)
    assert [f.name for f in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_to_another_disk_becomes_a_cache(
    tmp_path: Path, content: CacheContent, is_there: bool
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    if is_there:
        (other / "c.zarr").mkdir()
    (tmp_path / "c.zarr").symlink_to("other/c.zarr")
    for _ in range(2):
        CacheWriter.open_or_create(tmp_path / "c.zarr", content)
    assert (tmp_path / "c.zarr").is_symlink()
    assert [f.name for f in other.iterdir()] == ["c.zarr"]
    assert (other / "c.zarr/zarr.json").is_file()
    with pytest.raises(OSError, match="File exists") as caught:
        CacheWriter.open_or_create(other / "c.zarr/zarr.json/new.zarr", content)
    assert disk_error(caught.value)  # which the command says in one line


def test_a_folder_beside_the_cache_is_not_written_over(
    tmp_path: Path, content: CacheContent
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_bytes(b"x")
    path = tmp_path / "c.zarr"
    for make in (
        lambda: (tmp_path / "c.zarr.partial").symlink_to(photos),
        lambda: photos.rename(tmp_path / "c.zarr.partial"),
    ):
        make()
        with pytest.raises(CacheError, match=r"c\.zarr\.partial exists and is no cache"):
            CacheWriter.open_or_create(path, content)
        if (tmp_path / "c.zarr.partial").is_symlink():
            (tmp_path / "c.zarr.partial").unlink()
    assert files_of(tmp_path / "c.zarr.partial") == {"holiday.jpg": b"x"}


def test_a_plain_zarr_is_no_cache(tmp_path: Path, content: CacheContent) -> None:
    zarr.create_group(str(tmp_path / "plain.zarr"))
    for attempt in (
        lambda: FeatureCache.open(tmp_path / "plain.zarr"),
        lambda: CacheWriter.open_or_create(tmp_path / "plain.zarr", content),
    ):
        with pytest.raises(CacheError, match="is no feature cache"):
            attempt()


def test_a_newer_format_is_refused_by_name(filled: Path) -> None:
    document = json.loads((filled / "zarr.json").read_text())
    document["attributes"]["mfdetr_cache"]["format_version"] = 3
    (filled / "zarr.json").write_text(json.dumps(document))
    (filled / FOUNDATION_KEY).unlink()
    with pytest.raises(CacheError, match="has cache format 3, this version reads 2; update"):
        FeatureCache.open(filled)


def test_absent_and_empty_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="does not exist; make it with: mfdetr extract"):
        FeatureCache.open(tmp_path / "absent.zarr")
    with pytest.raises(CacheError, match="is no feature cache"):
        FeatureCache.open(tmp_path)
