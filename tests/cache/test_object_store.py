"""Caches in object stores: an in-memory one, and a real S3-speaking server on loopback."""

import contextlib
import pickle
import socket
import socketserver
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mfdetr_pipelines.cache.finish import run_finish
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.cache import VerifyConfig
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage import object_store
from mfdetr_cache.cache.storage.mirror import MirroredStorage
from mfdetr_cache.cache.storage.object_store import ObjectStorage
from mfdetr_cache.cache.storage.open import open_storage
from mfdetr_cache.errors import CacheError
from mfdetr_cache.reporter import SilentReporter
from tests.support import scenes
from tests.support.caches import contents
from tests.support.training import small_recipe, weights_of


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
    assert run_verify(VerifyConfig(location, full=True), SilentReporter()).faults == ()
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
    faults = run_verify(VerifyConfig(location), SilentReporter()).faults
    assert any("is missing" in f for f in faults)
    found = run_finish(location, SilentReporter())
    assert found.missing == ("view base: parts 0",)
    assert run_extract(config, SilentReporter()).num_extracted == 8
    assert run_finish(location, SilentReporter()).missing == ()


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
