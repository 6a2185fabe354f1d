"""Several processes on this machine: the same results, and one line where they end."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mfdetr_pipelines.ablation.run import run_ablate
from mfdetr_pipelines.config.shared import WorkOptions
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.process_engine import in_processes, run_tasks
from PIL import Image

from mfdetr_cache.cache import schema
from mfdetr_cache.errors import ConfigError, DatasetError, ImageError, StoppedError
from mfdetr_cache.reporter import SilentReporter
from tests.support import scenes
from tests.support.ablations import config as ablation
from tests.support.acts import act
from tests.support.caches import contents

TWO = WorkOptions(workers=2)


@pytest.fixture
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here as in each process: sums in another order have other last bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_item_comes_back_with_its_result() -> None:
    found = list(in_processes(act, list("abcdef"), 2))
    assert {item: text for item, (text, _) in found} == {x: x.upper() for x in "abcdef"}
    numbers = {number for _, (_, number) in found}
    assert 1 <= len(numbers) <= 2
    assert os.getpid() not in numbers


@pytest.mark.parametrize(
    ("item", "error", "said"),
    [
        ("refuse", DatasetError, "^cannot be used$"),
        ("die", ConfigError, "ended by signal 9"),
        ("exit", RuntimeError, "exit code 3"),
    ],
)
def test_an_end_in_a_process_is_told(item: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        list(in_processes(act, [item, "a"], 2))


def test_what_a_process_cannot_do_is_raised_as_it_was_there() -> None:
    with pytest.raises(ConnectionError, match="no network") as caught:
        list(in_processes(act, ["fail"], 1))
    assert "acts.py" in caught.value.__notes__[0]


def test_ctrl_c_ends_the_processes() -> None:
    results = run_tasks(act, list("abcd"), TWO, 2)
    _, (_, number) = next(results)
    with pytest.raises(StoppedError, match="goes on from there"):
        results.throw(KeyboardInterrupt())
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_a_process_asked_by_others_too_finishes_what_is_begun(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    results = in_processes(act, ["a", str(path)], 2)
    next(results)
    while not path.exists():
        time.sleep(0.01)
    results.close()  # type: ignore[attr-defined]
    assert path.read_text() == "finished"


def test_a_killed_command_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # without a main guard
    script.write_text(
        "from mfdetr_pipelines.process_engine import in_processes\n"
        "from tests.support.acts import act\n"
        "for _, (_, number) in in_processes(act, ['hang up', 'wait'], 1):\n"
        "    print(number, flush=True)\n"
    )
    command = [sys.executable, str(script)]
    path = os.pathsep.join(p or os.curdir for p in sys.path)
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        number = int(process.stdout.readline())
        process.kill()
    until = time.monotonic() + 10
    while _is_there(number) and time.monotonic() < until:
        time.sleep(0.01)
    assert not _is_there(number)


def _is_there(number: int) -> bool:
    """Whether a process runs; one that has ended may wait for somebody to take note."""
    try:
        return ") Z " not in Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False


@pytest.mark.usefixtures("_one_thread")
def test_processes_fill_the_cache_that_one_fills_and_warn_as_it_does(
    tmp_path: Path, rtdetr_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "PART_BYTES", 1)  # an image a part
    scenes.write_scenes(tmp_path, count=5, seed=5)
    bad, *odd = sorted((tmp_path / "images").iterdir())
    bad.write_bytes(b"no image")
    exif = Image.Exif()
    exif[0x0112] = 3
    for path in odd:
        Image.open(path).save(path, exif=exif)

    def extract(name: str, **changes: Any) -> Any:
        config = scenes.extract_config(
            tmp_path, str(rtdetr_folder), tmp_path / name, on_bad_image="skip", views=1, **changes
        )
        reporter = SilentReporter()
        summary = run_extract(config, reporter)
        # What is said of free space changes from minute to minute.
        return summary, sorted(m for m in reporter.messages if "GB free" not in m)

    whole, messages = extract("one.zarr")
    summary, told = extract("two.zarr", work=TWO)
    told.remove("in 2 processes")
    assert summary.num_extracted == whole.num_extracted == 8
    assert summary.box == whole.box
    assert contents(tmp_path / "two.zarr") == contents(tmp_path / "one.zarr")
    # Whichever was there first.
    assert [re.sub(r"\S+ is the first of", "first", m) for m in told] == [
        re.sub(r"\S+ is the first of", "first", m) for m in messages
    ]
    assert sum(f"skipped: image {bad}" in m for m in told) == 1
    assert sum("is the first of" in m for m in told) == 1


def test_a_bad_image_is_named_by_the_command(
    tmp_path: Path, rtdetr_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "PART_BYTES", 1)
    scenes.write_scenes(tmp_path / "scenes", count=2, seed=5)
    min((tmp_path / "scenes/images").iterdir()).write_bytes(b"no image")
    config = scenes.extract_config(
        tmp_path / "scenes", str(rtdetr_folder), tmp_path / "a.zarr", work=TWO
    )
    with pytest.raises(ImageError, match="on-bad-image skip leaves such images out"):
        run_extract(config, SilentReporter())


@pytest.mark.usefixtures("_one_thread")
def test_processes_train_the_heads_that_one_trains(tmp_path: Path, drawn_cache: Path) -> None:
    there = run_ablate(ablation(drawn_cache, tmp_path / "two", work=TWO), SilentReporter())
    here = run_ablate(ablation(drawn_cache, tmp_path / "one"), SilentReporter())
    assert [r.seeds for r in there] == [r.seeds for r in here]
    assert all(r.problem == "" for r in there)


def test_a_negative_number_of_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="--workers -1: give 1 or more"):
        WorkOptions(workers=-1)
