"""Several processes that fill one cache: shares, locks, what is missing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mfdetr_cli.signature import built
from mfdetr_pipelines.cache.finish import run_finish
from mfdetr_pipelines.config.shared import WorkOptions
from mfdetr_pipelines.extract import ExtractSummary, run_extract

from mfdetr_cache.cache import schema
from mfdetr_cache.cache.partition import Partition, partition_of_environment
from mfdetr_cache.cache.schema import Part
from mfdetr_cache.cache.writer import CacheWriter
from mfdetr_cache.errors import CacheError, ConfigError
from mfdetr_cache.reporter import SilentReporter
from tests.support import scenes
from tests.support.caches import contents
from tests.support.command import mfdetr


def test_partitions_are_disjoint_and_whole() -> None:
    parts = [Part("base", n) for n in range(11)]
    shares = [Partition(k, 4).of(parts) for k in range(1, 5)]
    assert sorted(p for share in shares for p in share) == parts
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for wrong in ((0, 4), (5, 4), (1, 0)):
        with pytest.raises(CacheError, match="give K/N with K from 1 to N"):
            Partition(*wrong)


@pytest.mark.parametrize(
    ("text", "environment", "wanted"),
    [
        (None, {}, Partition()),
        ("3/16", {}, Partition(3, 16)),
        (None, {"RANK": "2", "WORLD_SIZE": "8"}, Partition(3, 8)),
        ("1/1", {"RANK": "2", "WORLD_SIZE": "8"}, Partition()),
        (
            None,
            {
                "SLURM_ARRAY_TASK_ID": "12",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            Partition(2, 4),
        ),
    ],
)
def test_shares_come_from_the_option_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str | None, environment: dict[str, str], wanted: Any
) -> None:
    for key in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    config = built(WorkOptions, {"part": text})
    assert (config.part or partition_of_environment()) == wanted
    with pytest.raises(ConfigError, match="--part 3: write K/N, such as 3/16"):
        built(WorkOptions, {"part": "3"})


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image a part, so that eight images are eight parts."""
    monkeypatch.setattr(schema, "PART_BYTES", 1)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, scenes_folder: Path, rtdetr_folder: Path
) -> tuple[ExtractSummary, dict[str, bytes]]:
    """What one process makes of all images in two views, and its files."""
    path = tmp_path_factory.mktemp("whole") / "c.zarr"
    config = scenes.extract_config(scenes_folder, str(rtdetr_folder), path, views=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "PART_BYTES", 1)
        summary = run_extract(config, SilentReporter())
    return summary, contents(path)


def test_shares_in_any_order_make_the_cache_of_one_process(
    tmp_path: Path,
    scenes_folder: Path,
    rtdetr_folder: Path,
    small_parts: None,
    whole: tuple[ExtractSummary, dict[str, bytes]],
) -> None:
    path = tmp_path / "shared.zarr"
    assert whole[0].box is not None
    total = 0
    for number in (3, 1, 2):
        work = WorkOptions(Partition(number, 3))
        config = scenes.extract_config(scenes_folder, str(rtdetr_folder), path, views=1, work=work)
        summary = run_extract(config, SilentReporter())
        total += summary.num_extracted
        missing = run_finish(path, SilentReporter())
        assert missing.parts_missing == summary.parts_missing
        assert (summary.box is None) == (number != 2)
    assert total == 16
    assert summary.box == whole[0].box == missing.box
    assert contents(path) == whole[1]


def test_parts_that_are_being_written_are_refused(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, small_parts: None
) -> None:
    from mfdetr_cache.coco.annotations import load_coco_split
    from mfdetr_cache.coco.labelled import label_split
    from mfdetr_cache.detectors.registry import load_detector
    from mfdetr_cache.extraction.content import plan_cache

    path = tmp_path / "a.zarr"
    config = scenes.extract_config(scenes_folder, str(rtdetr_folder), path)
    detector = load_detector("hf", str(rtdetr_folder))
    labelled = label_split(load_coco_split(config.files.annotations), detector.spec)
    content = plan_cache(labelled, detector, config.maps, config.views)
    with CacheWriter.open_or_create(path, content, Partition(1, 2)):
        with pytest.raises(CacheError, match="is being written by another process"):
            CacheWriter.open_or_create(path, content, Partition(1, 2))
        with pytest.raises(CacheError, match="is being written by another process"):
            CacheWriter.open_or_create(path, content)
        CacheWriter.open_or_create(path, content, Partition(2, 2)).close()
    CacheWriter.open_or_create(path, content).close()


def test_three_processes_at_once_make_the_cache_of_one(
    tmp_path: Path,
    scenes_folder: Path,
    rtdetr_folder: Path,
    whole: tuple[ExtractSummary, dict[str, bytes]],
) -> None:
    """Started together on nothing: one creates the cache, the others find it."""
    code = (
        "import sys; from mfdetr_cache.cache import schema; schema.PART_BYTES = 1;"
        "from mfdetr_cli.app import main; main()"
    )

    path = tmp_path / "shared.zarr"
    command = [
        *(sys.executable, "-c", code, "extract", "--weights", str(rtdetr_folder)),
        *("--images", str(scenes_folder / "images"), "--dtype", "fp16", "--views", "1"),
        *("--annotations", str(scenes_folder / "instances.json")),
        *("--cache", str(path), "--device", "cpu"),
    ]
    running = [subprocess.Popen([*command, "--part", f"{k}/3"]) for k in range(1, 4)]
    assert [p.wait(timeout=300) for p in running] == [0, 0, 0]
    assert contents(path) == whole[1]
    assert mfdetr("cache", "finish", path).returncode == 0
    (path / "views/base/status/manifest/000001.json").unlink()
    found = mfdetr("cache", "finish", path)
    assert found.returncode == 1
    assert "view base: parts 1" in found.stdout
    assert "1 of 16 parts are missing" in found.stderr
