"""verify --live and repair on a real extraction of drawn images."""

import errno
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
from mfdetr_pipelines.cache import repair
from mfdetr_pipelines.cache.repair import RepairSummary, run_repair
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.cache import RepairConfig, VerifyConfig
from mfdetr_pipelines.config.shared import LiveDetector
from mfdetr_pipelines.extract import run_extract

from mfdetr_cache.cache import schema
from mfdetr_cache.cache.locks import locked
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.cache.storage.open import open_storage
from mfdetr_cache.errors import CacheError
from mfdetr_cache.reporter import SilentReporter
from tests.support.caches import files_of
from tests.support.detectors import save_rtdetr
from tests.support.scenes import extract_config


def repaired(cache: Path | str, weights: str, images: Path, annotations: Path) -> RepairSummary:
    config = RepairConfig(cache, weights, images, annotations, device="cpu")
    return run_repair(config, SilentReporter())


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, scenes_folder: Path, rtdetr_folder: Path
) -> Path:
    """Two views in four parts, int8. Repairing must keep these parts, not plan its own."""
    path = tmp_path_factory.mktemp("repair") / "whole.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "PART_BYTES", 100_000)
        config = extract_config(scenes_folder, str(rtdetr_folder), path, preset="int8", views=1)
        run_extract(config, SilentReporter())
    assert len(FeatureCache.open(path).layout.parts) == 4
    return path


@pytest.fixture
def copy(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy.zarr"))


def flip(file: Path, position: int = 60) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(bytes(data))


DAMAGES: dict[str, Any] = {
    "byte in a shard": lambda p: flip(p / "views/base/maps/c1/values/c/0/0"),
    "byte in an index": lambda p: flip(p / "views/base/maps/c1/affine/c/1/0/0", -9),
    "byte in a manifest": lambda p: flip(p / "views/base/status/manifest/000001.json", 2),
    "no manifest": lambda p: (p / "views/base/status/manifest/000000.json").unlink(),
    "no shard": lambda p: (p / "views/deformable-detr-0/queries/c/1/0/0").unlink(),
    "empty shard": lambda p: (p / "views/base/class_logits/c/0/0/0").write_bytes(b""),
    "byte in a column": lambda p: flip(p / "views/base/status/c/0", 8),
    "byte in the ground truth": lambda p: flip(p / "annotations/000000/views/base/run_length/c/0"),
    "no file names": lambda p: (p / "images/file_name_utf8/c/0").unlink(),
    "byte in the root": lambda p: flip(p / "zarr.json", 400),
    "another root": lambda p: (p / "zarr.json").write_text("{}"),
    "byte in the annotations": lambda p: flip(p / "views/base/status/annotations/000000.json"),
    "byte in the foundation": lambda p: flip(p / "views/base/status/manifest/foundation.json", 3),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_whatever_is_broken_is_found_and_mended(
    copy: Path, whole: Path, scenes_folder: Path, rtdetr_folder: Path, damage: str
) -> None:
    DAMAGES[damage](copy)
    assert run_verify(VerifyConfig(copy, full=True), SilentReporter()).faults
    summary = repaired(
        copy, str(rtdetr_folder), scenes_folder / "images", scenes_folder / "instances.json"
    )
    assert summary.whole
    assert summary.faults
    # Only what was broken went through the detector again.
    layout = FeatureCache.open(whole).layout
    assert summary.num_images == sum(len(layout.rows_of_part(p.number)) for p in summary.parts)
    assert len(summary.parts) == (0 if summary.foundation_files else 1)
    assert files_of(copy) == files_of(whole)


def test_a_whole_cache_is_left_alone(
    copy: Path, whole: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    data = (scenes_folder / "images", scenes_folder / "instances.json")
    assert repaired(copy, str(rtdetr_folder), *data).faults == ()
    assert files_of(copy) == files_of(whole)


def test_repair_with_another_detector_is_refused_and_changes_nothing(
    copy: Path, scenes_folder: Path, tmp_path: Path
) -> None:
    save_rtdetr(tmp_path / "other", seed=1)
    DAMAGES["no shard"](copy)
    before = files_of(copy)
    with pytest.raises(CacheError, match=r"another cache: detector\.weights_sha256"):
        repaired(
            copy,
            str(tmp_path / "other"),
            scenes_folder / "images",
            scenes_folder / "instances.json",
        )
    assert files_of(copy) == before


def test_live_runs_the_detector_again(
    whole: Path, scenes_folder: Path, rtdetr_folder: Path, tmp_path: Path
) -> None:
    source = LiveDetector(str(rtdetr_folder), scenes_folder / "images")
    summary = run_verify(VerifyConfig(whole, live=6, detector=source), SilentReporter())
    assert summary.faults == ()
    assert summary.live_images == 6
    assert summary.live_difference < 1e-3
    save_rtdetr(tmp_path / "other", seed=1)
    other = LiveDetector(str(tmp_path / "other"), scenes_folder / "images")
    found = run_verify(VerifyConfig(whole, live=2, detector=other), SilentReporter()).faults
    assert "another detector: weights_sha256 is" in found[0]
    with pytest.raises(CacheError, match="--live runs the detector again: give --weights"):
        run_verify(VerifyConfig(whole, live=2), SilentReporter())


def test_live_notices_other_images(
    whole: Path, scenes_folder: Path, rtdetr_folder: Path, tmp_path: Path
) -> None:
    """The one change no hash of the cache can see: pictures replaced under the same names."""
    from PIL import Image, ImageOps

    images = Path(shutil.copytree(scenes_folder / "images", tmp_path / "images"))
    for file in images.iterdir():
        ImageOps.invert(Image.open(file).convert("RGB")).save(file)
    source = LiveDetector(str(rtdetr_folder), images)
    summary = run_verify(VerifyConfig(whole, live=2, detector=source), SilentReporter())
    sizes, *off = summary.faults
    assert "another size in bytes than when they were extracted" in sizes
    assert len(off) == 2
    assert all("is off by" in fault for fault in off)


def test_repair_waits_for_nobody_and_destroys_nothing(
    copy: Path, whole: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    """While another process writes, the parts it has not sealed yet look broken."""
    (copy / "views/base/status/manifest/000001.json").unlink()
    before = files_of(copy)
    data = (scenes_folder / "images", scenes_folder / "instances.json")
    with (
        locked(LocalStorage(copy)),
        pytest.raises(CacheError, match="is being written by another process"),
    ):
        repaired(copy, str(rtdetr_folder), *data)
    assert files_of(copy) == before


def test_a_part_that_was_sealed_meanwhile_is_kept(
    whole: Path, scenes_folder: Path, rtdetr_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket has no locks: somebody writes the missing part while repair looks at the others."""
    location = f"memory://{uuid.uuid4()}"
    storage = open_storage(location)
    files = {k: v for k, v in files_of(whole).items() if not k.endswith(".lock")}
    for key, data in files.items():
        storage.write(key, [data])
    storage.delete("views/base/status/manifest/000000.json")
    storage.delete("views/base/status/manifest/000001.json")
    verified = repair.run_verify

    def meanwhile(*arguments: Any, **settings: Any) -> Any:
        found = verified(*arguments, **settings)
        key = "views/base/status/manifest/000001.json"
        storage.write(key, [files[key]])
        return found

    monkeypatch.setattr(repair, "run_verify", meanwhile)
    data = (scenes_folder / "images", scenes_folder / "instances.json")
    summary = repaired(location, str(rtdetr_folder), *data)
    assert len(summary.parts) == 2
    assert summary.num_images == len(FeatureCache.open(whole).layout.rows_of_part(0))
    assert {k: storage.read(k) for k in storage.sizes("")} == files


def test_a_whole_cache_on_a_read_only_disk(
    copy: Path, scenes_folder: Path, rtdetr_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_CREAT | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    data = (scenes_folder / "images", scenes_folder / "instances.json")
    assert repaired(copy, str(rtdetr_folder), *data).whole
