"""Reading by processes: what threads give, and nothing left behind."""

import os
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mfdetr_pipelines.extract import run_extract

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.child_process import start_child
from mfdetr_cache.errors import CacheError, ConfigError, TrainingError
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.input import loader, readers
from mfdetr_cache.training.input.readers import read_in_processes
from tests.support import loads, scenes
from tests.support.training import small_recipe, train, weights_of

needs_linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")


def read(
    rows_of: Callable[[int], list[int]],
    steps: int,
    load: Any = loads.load,
    processes: int = 2,
    threads: int = 0,
) -> Generator[list[Any], None, None]:
    return read_in_processes(
        load,
        rows_of,
        range(steps),
        processes,
        batch_size=3,
        largest_maps=0,
        device=torch.device("cpu"),
        threads_meanwhile=threads,
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every process that was started."""
    found: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any) -> subprocess.Popen[bytes]:
        found.append(start_child(*arguments))
        return found[-1]

    monkeypatch.setattr(readers, "start_child", start)
    return found


@needs_linux
def test_steps_come_in_order_and_stay_until_two_steps_later(
    started: list[subprocess.Popen[bytes]],
) -> None:
    sizes = [3, 3, 1, 3, 2, 3, 3, 3, 3, 1, 3, 3]

    def rows_of(step: int) -> list[int]:
        return [10 * step + i for i in range(sizes[step])]

    stream, before = read(rows_of, len(sizes)), []
    for step, loaded in enumerate(stream):
        assert [item["row"] for item in loaded] == rows_of(step)
        for when, items in ((step, loaded), (step - 1, before)):
            for item in items:
                wanted = loads.load(item["row"], when)
                for name in ("long", "across", "short"):
                    np.testing.assert_array_equal(item[name], wanted[name])
        before = loaded
    assert step == len(sizes) - 1
    assert len(started) == 2
    assert all(p.poll() is not None for p in started)


@needs_linux
def test_what_does_not_fit_comes_all_the_same() -> None:
    for step, loaded in enumerate(read(lambda s: [s, s + 1], 3, loads.load_much, processes=1)):
        for item in loaded:
            assert (item["much"] == item["row"] + step).all()


@needs_linux
def test_errors_come_as_they_are_and_end_the_processes(
    started: list[subprocess.Popen[bytes]],
) -> None:
    with pytest.raises(CacheError, match=r"^row 97 is damaged$"):
        list(read(lambda _: [1, 97], 1, processes=1))
    with pytest.raises(ValueError, match="a bug") as caught:
        list(read(lambda _: [98], 1, processes=1))
    assert "loads.py" in caught.value.__notes__[0]
    with pytest.raises(TrainingError, match=r"ended by itself \(exit code 3;"):
        list(read(lambda _: [99], 1, processes=1))
    assert len(started) == 3
    assert all(p.poll() is not None for p in started)


@needs_linux
def test_threads_read_until_the_processes_are_there(
    started: list[subprocess.Popen[bytes]],
) -> None:
    stream = read(lambda s: [s, s + 1], 10_000, loads.load_where, threads=2)
    places = []
    for step, loaded in enumerate(stream):
        assert [item["row"] for item in loaded] == [step, step + 1]
        places.append({item["process"] for item in loaded})
        # All three steps that were asked for before they were there are over.
        if len(places) > 4 and os.getpid() not in places[-1]:
            break
        time.sleep(0.01)
    stream.close()
    assert places[0] == {os.getpid()}
    assert places[-1] == {p.pid for p in started}
    change = places.index(places[-1])
    assert all(found == {os.getpid()} for found in places[:change])
    assert all(p.poll() is not None for p in started)


@needs_linux
def test_threads_go_on_where_a_process_cannot_start(
    started: list[subprocess.Popen[bytes]],
) -> None:
    stream = read(lambda step: [step], 10_000, loads.Unloadable(), processes=1, threads=1)
    slowly = (time.sleep(0.01) or found for found in stream)

    def read_on() -> Any:
        while not started or started[0].poll() is None:
            next(slowly)
        return [next(slowly) for _ in range(10)][-1]

    with pytest.warns(RuntimeWarning, match=r"threads go on reading: .* \(exit code 1;"):
        last = read_on()
    assert last[0]["process"] == os.getpid()
    assert all(p.poll() is not None for p in started)
    stream.close()
    with pytest.raises(TrainingError, match=r"ended by itself \(exit code 1;"):
        list(read(lambda _: [1], 9, loads.Unloadable(), processes=1))


def test_processes_read_beside_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", None, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert TrainConfig().reader_processes(on_gpu=True) == 6
    assert TrainConfig().reader_processes(on_gpu=False) == 0
    assert TrainConfig(num_processes=3).reader_processes(on_gpu=False) == 3
    assert TrainConfig(num_processes=0).reader_processes(on_gpu=True) == 0
    assert TrainConfig(num_threads=4).reader_processes(on_gpu=True) == 0
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert TrainConfig().reader_processes(on_gpu=True) == 0
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delattr(os, "memfd_create")
    assert TrainConfig().reader_processes(on_gpu=True) == 0


def test_other_systems_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with pytest.raises(ConfigError, match="num_processes needs Linux"):
        next(read(lambda _: [1], 1))


@pytest.fixture(scope="module")
def int8_cache(
    tmp_path_factory: pytest.TempPathFactory, scenes_folder: Path, rtdetr_folder: Path
) -> Path:
    path = tmp_path_factory.mktemp("int8") / "c.zarr"
    config = scenes.extract_config(scenes_folder, str(rtdetr_folder), path, preset="int8", views=1)
    run_extract(config, SilentReporter())
    return path


def test_no_row_takes_more_memory_than_is_set_aside(drawn_cache: Path, int8_cache: Path) -> None:
    for cache in map(FeatureCache.open, (drawn_cache, int8_cache)):
        names = tuple(m.name for m in cache.spec.maps)
        most = max(
            sum(
                m.values.nbytes + (0 if m.affine is None else m.affine.nbytes)
                for m in cache.read(row, names, view).maps.values()
            )
            for view in cache.views
            for row in cache.rows
        )
        assert most <= cache.largest_maps(names) < 2 * most


@needs_linux
def test_a_head_ends_with_the_weights_that_threads_give(
    tmp_path: Path, int8_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Threads would be done before the processes are there.
    monkeypatch.setattr(
        loader,
        "read_in_processes",
        lambda *a, **k: read_in_processes(*a, **{**k, "threads_meanwhile": 0}),
    )
    weights = []
    for processes in (0, 2):
        recipe = small_recipe(steps=7, box_jitter=0.1, fine_size=16, num_processes=processes)
        train(int8_cache, tmp_path / str(processes), recipe)
        weights.append(weights_of(tmp_path / str(processes)))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
