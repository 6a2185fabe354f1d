"""What every storage promises, and what a local folder does beyond it."""

import errno
import os
import threading
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.mirror import MirroredStorage
from mfdetr_cache.cache.storage.object_store import ObjectStorage
from mfdetr_cache.errors import CacheError


def test_listing_a_folder_that_others_write_to(tmp_path: Path) -> None:
    """A file may be renamed between its listing and the question for its size."""
    storage = LocalStorage(tmp_path)
    storage.write("kept", [b"1234"])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            storage.write("a/changing", [b"12"])
            storage.delete("a/changing")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2000):
            sizes = storage.sizes("")
            assert sizes.pop("kept") == 4
            assert set(sizes) <= {"a/changing", "a/changing.partial"}
    finally:
        stop.set()
        writer.join()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux only")
@pytest.mark.parametrize("in_memory", [True, False, None])
def test_the_disk_is_asked_ahead_for_what_is_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool | None
) -> None:
    """None: a file system that cannot tell."""
    size = 600 * 1024
    data = np.random.default_rng(0).bytes(3 * size)
    storage = LocalStorage(tmp_path)
    storage.write("a", [data])
    asked: list[tuple[int, ...]] = []

    read = os.preadv

    def look(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if not flags:
            return read(descriptor, buffers, offset)
        assert (offset, flags) == (3 * size - 1, os.RWF_NOWAIT)
        if in_memory is None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        if not in_memory:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return 1

    monkeypatch.setattr(os, "preadv", look)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *rest: asked.append(rest))
    ranges = [(0, size), (size, size), (2 * size, size)]
    found = bytearray(3 * size)
    places = [[memoryview(found)[start : start + n]] for start, n in ranges]
    assert storage.read_into("a", ranges, places)
    assert found == data
    assert asked == ([] if in_memory else [(0, 3 * size, os.POSIX_FADV_WILLNEED)])


@pytest.mark.parametrize("kind", ["folder", "memory", "mirror"])
def test_every_storage_keeps_what_was_written(tmp_path: Path, kind: str) -> None:
    storage = {
        "folder": lambda: LocalStorage(tmp_path / "a"),
        "memory": lambda: ObjectStorage(f"memory://{uuid.uuid4()}"),
        "mirror": lambda: MirroredStorage(
            ObjectStorage(f"memory://{uuid.uuid4()}"), tmp_path / "mirror", 1000
        ),
    }[kind]()
    data = bytes(range(256))
    storage.write("zarr.json", [b"{}"])
    storage.write("x/y", [data[:100], data[100:]])
    assert storage.read("x/y") == data
    for _ in range(2):
        assert storage.read_ranges("x/y", [(0, 10), (10, 20)]) == [data[:10], data[10:30]]
    assert storage.size("x/y") == 256
    assert storage.size("x/z") is None
    assert storage.sizes("") == {"x/y": 256, "zarr.json": 2}
    assert storage.sizes("x") == {"x/y": 256}
    storage.delete("x/y")
    storage.delete("x/y")
    assert storage.size("x/y") is None
    with pytest.raises(FileNotFoundError):
        storage.read("x/y")


def test_pipes_devices_and_loops_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    storage = LocalStorage(tmp_path)
    for key in ("pipe", "zeros", "folder"):
        with pytest.raises(CacheError, match=f"{key} is no regular file"):
            storage.read(key)
        with pytest.raises(CacheError, match=f"{key} is no regular file"):
            storage.read_ranges(key, [(0, 4)])
        assert storage.size(key) is None
    with pytest.raises(CacheError, match="loop cannot be read"):
        storage.read("loop")


def test_nothing_is_changed_behind_a_link_that_leaves_the_cache(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a").write_bytes(b"mine")
    storage = LocalStorage(tmp_path / "cache")
    (tmp_path / "cache/within").mkdir(parents=True)
    (tmp_path / "cache/out").symlink_to("../mine")
    (tmp_path / "cache/back").symlink_to("within")
    for change in (lambda: storage.write("out/a", [b"other"]), lambda: storage.delete("out/a")):
        with pytest.raises(CacheError, match="out/a is behind a link that leaves the cache"):
            change()
    assert (mine / "a").read_bytes() == b"mine"
    storage.write("back/a", [b"own"])
    assert storage.read("within/a") == b"own"
    # A cache may itself be a link.
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    LocalStorage(tmp_path / "link").delete("within/a")
    assert storage.size("within/a") is None


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        LocalStorage(tmp_path).write("a/b", [b"123"])
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []
