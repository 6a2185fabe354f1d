"""Caches in object stores: an in-memory one, and a real S3-speaking server on loopback."""

import contextlib
import errno
import json
import os
import pickle
import socket
import socketserver
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfdetr_pipelines.cache.finish import run_finish
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage import object_store
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.mirror import MirroredStorage
from mfdetr_cache.cache.storage.object_store import ObjectStorage
from mfdetr_cache.cache.storage.open import open_storage
from mfdetr_cache.errors import CacheError
from mfdetr_cache.reporter import SilentReporter
from tests.pipelines.test_train_head import small_recipe, weights_of
from tests.support import scenes


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of a moto server."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class _Cutting(socketserver.StreamRequestHandler):
    """Passes bytes on to a server; cuts the connections whose turn it is after some bytes."""

    def handle(self) -> None:
        server: Any = self.server
        with server.lock:
            server.connections += 1
            cut = server.connections in server.cut
        if time.monotonic() < server.away_until:
            return
        with socket.create_connection(server.upstream) as upstream:
            sender = threading.Thread(target=self._pump, args=(self.connection, upstream))
            sender.start()
            self._pump(upstream, self.connection, 20_000 if cut else None)
            if cut:
                server.cuts += 1
            for end in (self.connection, upstream):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            sender.join()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, most: int | None = None) -> None:
        passed = 0
        try:
            while data := source.recv(65536):
                passed += len(data)
                target.sendall(data)
                if most is not None and passed > most:
                    return
        except OSError:
            return


class _Proxy(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Cutting)
        self.upstream, self.lock = upstream, threading.Lock()
        self.connections, self.cuts, self.cut = 0, 0, set[int]()
        self.away_until = 0.0


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, _Proxy]]:
    """An empty bucket behind a proxy that can cut connections."""
    host, port = s3_server.removeprefix("http://").split(":")
    proxy = _Proxy((host, int(port)))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    name = f"b{uuid.uuid4().hex[:12]}"
    for key, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "never-to-be-shown",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}",
    }.items():
        monkeypatch.setenv(key, value)
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{name}", method="PUT"))
    yield f"s3://{name}", proxy
    proxy.shutdown()
    proxy.server_close()


def contents(location: str | Path) -> dict[str, bytes]:
    storage = open_storage(location)
    return {k: storage.read(k) for k in storage.sizes("") if not k.endswith(".lock")}


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


def test_storages_travel_to_other_processes(
    tmp_path: Path, bucket: tuple[str, _Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    far = ObjectStorage(f"{bucket[0]}/x")
    far.write("zarr.json", [b"{}"])
    far.write("a", [b"abc"])
    for storage in (far, MirroredStorage(far, tmp_path / "m", 100)):
        travelled = pickle.dumps(storage)
        assert b"never-to-be-shown" not in travelled
        assert pickle.loads(travelled).read("a") == b"abc"


def test_urls_that_cannot_be_used_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match="ftp://x: unknown kind of store ftp://; use a folder, or"):
        open_storage("ftp://x")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-to-be-shown")
    storage = ObjectStorage("s3://bucket/x.zarr", max_retries=0)
    with pytest.raises(CacheError, match="s3://bucket/x.zarr cannot be used") as caught:
        storage.read("zarr.json")
    assert "\n" not in str(caught.value)
    assert "never-to-be-shown" not in str(caught.value)


def test_a_store_that_is_away_is_waited_for(
    bucket: tuple[str, _Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once, and when it is back; one that never answered is an error at once."""
    url, proxy = bucket
    storage = ObjectStorage(f"{url}/x", max_retries=0, patience=60)
    proxy.away_until = time.monotonic() + 60
    with pytest.raises(CacheError, match="cannot be used"):
        storage.read("a")
    proxy.away_until = 0
    storage.write("a", [b"abc"])
    for ask in (lambda: storage.read("a"), lambda: pickle.loads(pickle.dumps(storage)).read("a")):
        proxy.away_until = time.monotonic() + 0.8
        with pytest.warns(RuntimeWarning) as told:
            assert ask() == b"abc"
        away, back = (str(warning.message) for warning in told)
        assert away.startswith(f"{url}/x does not answer (")
        assert "asked again for 1 minutes" in away
        assert f"{url}/x answers again after " in back
    # Who is asked to stop waits no longer, and patience ends.
    proxy.away_until = time.monotonic() + 60
    storage._patience = 0.3
    with pytest.raises(CacheError, match="cannot be used"), pytest.warns(RuntimeWarning):
        storage.read("a")
    storage._patience = 60
    monkeypatch.setattr(object_store, "is_stopping", lambda: True)
    with pytest.raises(CacheError, match="cannot be used"):
        storage.read("a")


def test_a_cache_in_s3_is_filled_trained_from_and_evaluated(
    bucket: tuple[str, _Proxy],
    tmp_path: Path,
    scenes_folder: Path,
    rtdetr_folder: Path,
    drawn_cache: Path,
) -> None:
    """Byte for byte the cache of a folder, with connections cut on the way."""
    url, proxy = bucket
    location = f"{url}/caches/val.zarr"
    proxy.cut = {5, 9, 14, 20, 31}
    config = scenes.extract_config(scenes_folder, str(rtdetr_folder), location)
    summary = run_extract(config, SilentReporter())
    assert summary.num_extracted == summary.num_images == 8
    assert contents(location) == contents(drawn_cache)
    assert run_verify(location, SilentReporter(), full=True).faults == ()
    # The same command finds everything done.
    assert run_extract(config, SilentReporter()).num_extracted == 0
    recipe = small_recipe(steps=3)
    for name, cache in (("s3", location), ("folder", drawn_cache)):
        settings = TrainHeadConfig(cache, tmp_path / name, recipe)
        run_train_head(settings, SilentReporter())
    remote, local = weights_of(tmp_path / "s3"), weights_of(tmp_path / "folder")
    assert all((remote[k] == local[k]).all() for k in local)
    found = run_evaluate(EvaluateConfig(location, tmp_path / "s3"), SilentReporter())
    wanted = run_evaluate(EvaluateConfig(drawn_cache, tmp_path / "folder"), SilentReporter())
    assert found.metrics() == wanted.metrics()
    assert proxy.cuts >= 1
    # Nothing that was written names a credential.
    written = b"".join(f.read_bytes() for f in (tmp_path / "s3").rglob("*") if f.is_file())
    assert b"never-to-be-shown" not in written


def test_a_lost_object_is_noticed(scenes_folder: Path, rtdetr_folder: Path) -> None:
    location = f"memory://{uuid.uuid4()}"
    config = scenes.extract_config(scenes_folder, str(rtdetr_folder), location)
    run_extract(config, SilentReporter())
    storage = open_storage(location)
    key = next(k for k in storage.sizes("views/base/maps") if "/values/c/" in k)
    storage.delete(key)
    assert not FeatureCache.open(location).is_complete
    faults = run_verify(location, SilentReporter(), full=False).faults
    assert any("is missing" in f for f in faults)
    found = run_finish(location, SilentReporter())
    assert found.missing == ("view base: parts 0",)
    assert run_extract(config, SilentReporter()).num_extracted == 8
    assert run_finish(location, SilentReporter()).missing == ()


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


@pytest.mark.parametrize("objects", [0, 1, 40, -1])
def test_a_creation_that_was_killed_goes_on_in_a_bucket(
    scenes_folder: Path, rtdetr_folder: Path, drawn_cache: Path, objects: int
) -> None:
    """The root is written last; whatever creation left before it is ours."""
    location = f"memory://{uuid.uuid4()}"
    storage = open_storage(location)
    real, written = ObjectStorage.write, []

    def killed(self: Any, key: str, pieces: Any) -> Any:
        if len(written) == objects or (objects < 0 and key == "zarr.json"):
            raise KeyboardInterrupt
        written.append(key)
        return real(self, key, pieces)

    config = scenes.extract_config(scenes_folder, str(rtdetr_folder), location)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectStorage, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run_extract(config, SilentReporter())
    assert len(storage.sizes("")) == len(written)
    run_extract(config, SilentReporter())
    assert contents(location) == contents(drawn_cache)


def test_somebody_elses_objects_are_not_touched(scenes_folder: Path, rtdetr_folder: Path) -> None:
    location = f"memory://{uuid.uuid4()}"
    open_storage(location).write("images/holiday.jpg", [b"x"])
    config = scenes.extract_config(scenes_folder, str(rtdetr_folder), location)
    with pytest.raises(CacheError, match="exists and is no cache; nothing was touched"):
        run_extract(config, SilentReporter())
    assert contents(location) == {"images/holiday.jpg": b"x"}


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


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        LocalStorage(tmp_path).write("a/b", [b"123"])
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []
