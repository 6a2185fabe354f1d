"""A local mirror of a store: what it keeps, and what it does when copies are damaged."""

import errno
import json
import tempfile
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.mirror import MirroredStorage
from mfdetr_cache.cache.storage.object_store import ObjectStorage
from mfdetr_cache.cache.storage.open import open_storage
from mfdetr_cache.reporter import SilentReporter
from tests.support import scenes
from tests.support.caches import contents
from tests.support.training import small_recipe


def test_two_processes_keep_the_same_piece_in_a_mirror(tmp_path: Path) -> None:
    """Both miss it, both fetch it, both keep it; whoever reads finds it whole."""
    source = ObjectStorage(f"memory://{uuid.uuid4()}")
    source.write("zarr.json", [b"{}"])
    data = np.random.default_rng(0).bytes(100_000)
    source.write("a", [data])

    def read(_: int) -> bool:
        mirror = MirroredStorage(source, tmp_path / "mirror", 150_000)
        return all(
            mirror.read_ranges("a", [(0, size)]) == [data[:size]] for size in range(90_000, 90_200)
        )

    with ThreadPoolExecutor(4) as readers:
        assert all(readers.map(read, range(4)))
    held = LocalStorage(tmp_path / "mirror").sizes("")
    assert sum(held.values()) <= 4 * 150_000
    assert not [key for key in held if key.endswith(".partial")]


def test_processes_that_share_a_mirror_stay_within_its_size(tmp_path: Path) -> None:
    """Together, not each: a training beside a GPU has eight that read."""
    source = ObjectStorage(f"memory://{uuid.uuid4()}")
    data = np.random.default_rng(0).bytes(200_000)
    source.write("zarr.json", [b"{}"])
    source.write("a", [data])
    mirrors = [MirroredStorage(source, tmp_path / "m", 20_000) for _ in range(8)]
    most = 0
    for index in range(1000):
        start = 200 * index
        assert mirrors[index % 8].read_ranges("a", [(start, 200)]) == [data[start : start + 200]]
        most = max(most, sum(f.stat().st_size for f in (tmp_path / "m").rglob("*") if f.is_file()))
    # Two pieces of each before anybody has seen that there are others.
    assert 15_000 < most <= 20_000 + 8 * 2 * 200


def test_a_mirror_without_room_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ObjectStorage(f"memory://{uuid.uuid4()}")
    source.write("zarr.json", [b"{}"])
    source.write("a", [b"0123456789"])
    mirror = MirroredStorage(source, tmp_path / "mirror", 1000)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.warns(RuntimeWarning, match="mirror is full; what is read is no longer kept there"):
        assert mirror.read_ranges("a", [(2, 3)]) == [b"234"]
    assert mirror.read_ranges("a", [(4, 3)]) == [b"456"]
    monkeypatch.undo()
    assert LocalStorage(tmp_path / "mirror").sizes("") == {}


def test_a_mirror_reads_once_and_stays_within_its_size(tmp_path: Path) -> None:
    source = ObjectStorage(f"memory://{uuid.uuid4()}")
    random = np.random.default_rng(0)
    data = random.bytes(4000)
    source.write("zarr.json", [b"{}"])
    source.write("a", [data])
    mirror = MirroredStorage(source, tmp_path / "m", 1000)
    for start in random.permutation(40).tolist() * 2:
        assert mirror.read_ranges("a", [(100 * start, 100)]) == [data[100 * start :][:100]]
        held = sum(f.stat().st_size for f in (tmp_path / "m").rglob("*") if f.is_file())
        assert held <= 1000
    kept = MirroredStorage(source, tmp_path / "m2", 10_000)
    first = kept.read_ranges("a", [(5, 7), (50, 9)])
    source.delete("a")
    assert kept.read_ranges("a", [(5, 7), (50, 9)]) == first
    again = MirroredStorage(source, tmp_path / "m2", 10_000)
    assert again.read_ranges("a", [(50, 9)]) == first[1:]
    with pytest.raises(FileNotFoundError):
        again.read_ranges("a", [(50, 10)])
    # Another cache under the same URL: what is kept of the old one is not its.
    source.write("zarr.json", [b'{"another": "cache"}'])
    source.write("a", [data[::-1]])
    other = MirroredStorage(source, tmp_path / "m2", 10_000)
    assert other.read_ranges("a", [(5, 7), (50, 9)]) == [data[::-1][5:12], data[::-1][50:59]]


def test_a_mirror_keeps_what_came_first(tmp_path: Path) -> None:
    """Epochs in new orders: as many hits as it holds of the cache, where LRU has next to none."""
    source = ObjectStorage(f"memory://{uuid.uuid4()}")
    source.write("zarr.json", [b"{}"])
    source.write("a", [bytes(40_000)])
    mirror = MirroredStorage(source, tmp_path / "m", 10_000)
    random = np.random.default_rng(0)

    def epoch() -> None:
        for piece in random.permutation(400).tolist():
            mirror.read_ranges("a", [(100 * piece, 100)])

    epoch()
    kept = set(LocalStorage(tmp_path / "m").sizes(""))
    assert len(kept) == 100
    epoch()
    assert set(LocalStorage(tmp_path / "m").sizes("")) == kept


def test_training_through_a_mirror_reads_the_store_once(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = f"memory://{uuid.uuid4()}"
    run_extract(
        scenes.extract_config(scenes_folder, str(rtdetr_folder), location), SilentReporter()
    )
    asked: list[tuple[str, tuple[int, int]]] = []
    real = ObjectStorage.read_ranges

    def counted(self: Any, key: str, ranges: Any) -> Any:
        asked.extend((key, tuple(r)) for r in ranges)
        return real(self, key, ranges)

    monkeypatch.setattr(ObjectStorage, "read_ranges", counted)
    mirror = MirroredStorage(open_storage(location), tmp_path / "mirror", 10**9)
    recipe = small_recipe(steps=9)
    run_train_head(TrainHeadConfig(mirror, tmp_path / "run", recipe), SilentReporter())
    # Three epochs; two readers may ask for the same piece at the same moment.
    assert len(asked) <= 1.2 * len(set(asked))
    document = json.loads((tmp_path / "run/config.json").read_text())
    assert document["cache"]["path"] == location
    assert any((tmp_path / "mirror").iterdir())


@pytest.mark.parametrize("key", ["views/base/maps/c1/values/c/0/0", "views/base/queries/c/0/0/0"])
@pytest.mark.parametrize("damage", ["flip", "other bytes", "cut off"])
def test_a_damaged_copy_is_read_again_from_the_source(
    tmp_path: Path,
    scenes_folder: Path,
    rtdetr_folder: Path,
    drawn_cache: Path,
    key: str,
    damage: str,
) -> None:
    """Also the copy of an index; the mirror is named and the bucket, which is whole, is not."""
    source = ObjectStorage(f"memory://{uuid.uuid4()}")
    for name, data in contents(drawn_cache).items():
        source.write(name, [data])
    wanted = [FeatureCache.open(drawn_cache).read(row) for row in range(8)]

    def read() -> None:
        cache = FeatureCache.open(MirroredStorage(source, tmp_path / "m", 10**9))
        for row, image in enumerate(wanted):
            found = cache.read(row)
            assert (found.queries == image.queries).all()
            assert (found.maps["c1"].to_array() == image.maps["c1"].to_array()).all()

    read()
    flat = key.replace("/", "%2F")
    copies = [f for f in (tmp_path / "m").glob(f"*/{flat}/*") if f.is_file()]
    assert copies
    for copy in copies:
        data = bytearray(copy.read_bytes())
        if damage == "flip":
            data[len(data) // 2] ^= 1
        elif damage == "cut off":
            del data[-1]
        else:
            data = bytearray(len(data))
        copy.write_bytes(data)
    if damage == "cut off":
        read()  # another size: no copy at all
    else:
        with pytest.warns(RuntimeWarning, match=r"copies of memory://.* in .*m were damaged"):
            read()
    # It is kept again, and right.
    source.delete(key)
    source.write(key, [bytes(len(contents(drawn_cache)[key]))])
    read()


def test_wrong_bytes_on_the_way_are_not_kept(tmp_path: Path, drawn_cache: Path) -> None:
    """A store that answers once with a flipped bit."""
    source = ObjectStorage(f"memory://{uuid.uuid4()}")
    for name, data in contents(drawn_cache).items():
        source.write(name, [data])
    mirror = MirroredStorage(source, tmp_path / "m", 10**9)
    cache = FeatureCache.open(mirror)
    real, asked = source.read_ranges, []

    def once(key: str, ranges: Any) -> list[bytes]:
        found = real(key, ranges)
        asked.append(key)
        if len(asked) == 3:
            found[0] = bytes([found[0][0] ^ 1]) + found[0][1:]
        return found

    source.read_ranges = once  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="is read again from the source"):
        found = cache.read(0)
    wanted = FeatureCache.open(drawn_cache).read(0)
    assert (found.class_logits == wanted.class_logits).all()
    assert (found.maps["c1"].to_array() == wanted.maps["c1"].to_array()).all()


class _LyingStorage(ObjectStorage):
    """Answers one request, the ``wrong``-th, with what is not there."""

    asked, wrong, kind = 0, -1, ""

    def read(self, key: str) -> bytes:
        return self._changed(super().read(key))

    def read_ranges(self, key: str, ranges: Any) -> list[bytes]:
        return [self._changed(piece) for piece in super().read_ranges(key, ranges)]

    def _changed(self, data: bytes) -> bytes:
        self.asked += 1
        if self.asked != self.wrong or not data:
            return data
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        return {"flip": flipped, "short": data[:-1], "zeros": bytes(len(data))}[self.kind]


@pytest.mark.parametrize("kind", ["flip", "short", "zeros"])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_a_store_that_answers_wrong_once_is_asked_again(
    tmp_path: Path, drawn_cache: Path, kind: str, *, is_mirrored: bool
) -> None:
    """Whichever answer it is: root, seals, columns, indexes, chunks. It is said once."""
    url = f"memory://{uuid.uuid4()}"
    for name, data in contents(drawn_cache).items():
        ObjectStorage(url).write(name, [data])
    wanted = FeatureCache.open(drawn_cache).read(0)

    def read(wrong: int) -> int:
        storage = _LyingStorage(url)
        storage.wrong, storage.kind = wrong, kind
        folder = tmp_path / str(wrong)
        cache = FeatureCache.open(
            MirroredStorage(storage, folder, 10**9) if is_mirrored else storage
        )
        found = cache.read(0)
        assert (found.class_logits == wanted.class_logits).all()
        assert (found.maps["c1"].to_array() == wanted.maps["c1"].to_array()).all()
        assert cache.ground_truth(0).boxes_xyxy.shape == (2, 4)
        return storage.asked

    for wrong in range(1, read(-1) + 1):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            read(wrong)
        assert len(told) <= 1
