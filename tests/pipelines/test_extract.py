import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.cache import VerifyConfig
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.config.shared import LiveDetector
from mfdetr_pipelines.extract import run_extract
from PIL import Image

from mfdetr_cache.cache import schema
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import (
    CacheError,
    ConfigError,
    DatasetError,
    DetectorError,
    ImageError,
    StoppedError,
)
from mfdetr_cache.extraction import stream as extraction
from mfdetr_cache.reporter import SilentReporter
from tests.support import detectors, scenes
from tests.support.caches import files_of


def run(folder: Path, weights: Path, cache: Path, **changes: Any) -> tuple[Any, list[str]]:
    reporter = SilentReporter()
    return run_extract(scenes.extract_config(folder, str(weights), cache, **changes), reporter), (
        reporter.messages
    )


def test_cached_values_are_the_detectors(
    drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    """Bit for bit where stored in float32; rounded once to float16 elsewhere."""
    detector = load_detector("hf", str(rtdetr_folder))
    cache = FeatureCache.open(drawn_cache)
    assert len(cache) == 8
    pictures = [
        load_image(scenes_folder / "images" / image.file_name, image.geometry.original_hw)
        for image in cache
    ]
    # All have one input size and are small: they went through the detector together.
    outputs = detector.forward(torch.stack([detector.preprocess(p) for p in pictures]))
    for index, image in enumerate(cache):
        output = outputs.of_image(index)
        assert (image.class_logits == output.class_logits[0].numpy()).all()
        assert (image.boxes_cxcywh_norm == output.boxes_cxcywh_norm[0].numpy()).all()
        assert (image.queries == output.queries[0].half().numpy()).all()
        for name, values in output.maps.items():
            wanted = values[0].permute(1, 2, 0).half().numpy()
            assert (image.maps[name].to_array() == wanted).all()


def test_implausible_detectors_are_reported(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    summary, messages = run(scenes_folder, rtdetr_folder, tmp_path / "c.zarr", limit=3)
    assert summary.num_images == 3
    assert any("implausibly low for a trained detector" in m for m in messages)


def test_what_is_odd_about_files_is_told_with_the_first_one(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    folder = tmp_path / "scenes"
    shutil.copytree(scenes_folder, folder)
    names = [i["file_name"] for i in scenes.load_annotations(folder)["images"]]
    exif = Image.Exif()
    exif[0x0112] = 3
    for name in names[:2]:
        Image.open(folder / "images" / name).save(folder / "images" / name, exif=exif)
    _, messages = run(folder, rtdetr_folder, tmp_path / "c.zarr", limit=3)
    told = [m for m in messages if "images whose size cannot tell whether" in m]
    assert [m.split(" images")[0] for m in told] == [
        f"warning: {names[0]} is the first of",
        "warning: 2",
    ]


def test_killed_at_any_moment_and_run_again(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 a real process; the same command ends in the bytes of an uninterrupted run."""
    code = """
import sys
from pathlib import Path
from mfdetr_cache.cache import schema
schema.PART_IMAGES = 2
from mfdetr_cache.reporter import SilentReporter
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.config.extract import ExtractConfig
folder, weights, cache = map(Path, sys.argv[1:4])
files = {"images": folder / "images", "annotations": folder / "instances.json"}
run_extract(ExtractConfig(str(weights), cache, **files), SilentReporter())
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def start(cache: Path) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-c", code, str(scenes_folder), str(rtdetr_folder), str(cache)]
        return subprocess.Popen(arguments, env=environment)

    monkeypatch.setattr(schema, "PART_IMAGES", 2)
    files = {"images": scenes_folder / "images", "annotations": scenes_folder / "instances.json"}

    def run_to_the_end(cache: Path) -> dict[str, bytes]:
        run_extract(ExtractConfig(str(rtdetr_folder), cache, **files), SilentReporter())
        return {k: v for k, v in files_of(cache).items() if not k.endswith(".partial")}

    whole = run_to_the_end(tmp_path / "whole.zarr")
    assert sum("manifest/0" in name for name in whole) == 4
    path = tmp_path / "killed.zarr"
    for parts in (1, 2):
        process = start(path)
        deadline = time.monotonic() + 120
        while len(list(path.glob("views/base/status/manifest/0*.json"))) < parts:
            assert time.monotonic() < deadline
            assert process.poll() is None or process.returncode == 0
            if process.poll() is not None:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run_to_the_end(path) == whole


def test_ctrl_c_keeps_what_was_sealed(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mfdetr_cache.extraction.stream import Extraction

    real = Extraction._items_of
    calls = []

    def interrupted(self: Any, batch: Any, images: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            deadline = time.monotonic() + 120
            while not list(tmp_path.glob("c.zarr/views/base/status/manifest/0*.json")):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            raise KeyboardInterrupt
        return real(self, batch, images)

    monkeypatch.setattr(schema, "PART_BYTES", 1)
    monkeypatch.setattr(Extraction, "_items_of", interrupted)
    with pytest.raises(StoppedError, match="of 8 images are kept in sealed parts"):
        run(scenes_folder, rtdetr_folder, tmp_path / "c.zarr")
    monkeypatch.setattr(Extraction, "_items_of", real)
    summary, _ = run(scenes_folder, rtdetr_folder, tmp_path / "c.zarr")
    assert summary.num_images == 8
    assert 4 <= summary.num_extracted < 8


def test_fewer_queries_are_the_best_ones(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    from mfdetr_cache.detectors.options import DetectorOptions

    options = DetectorOptions(num_queries=7)
    run(scenes_folder, rtdetr_folder, tmp_path / "c.zarr", limit=2, options=options)
    few, full = FeatureCache.open(tmp_path / "c.zarr")[0], FeatureCache.open(drawn_cache)[0]
    best = np.sort(np.argsort(-full.class_logits.max(1))[:7])
    assert (few.queries == full.queries[best]).all()
    with pytest.raises(DetectorError, match="--num-queries 21: this detector has 1 to 20"):
        run(
            scenes_folder,
            rtdetr_folder,
            tmp_path / "d.zarr",
            options=DetectorOptions(num_queries=21),
        )


@pytest.fixture
def faulty_folder(tmp_path: Path) -> Path:
    """Image 2 is cut off, image 5 is not on disk."""
    folder = tmp_path / "faulty"
    document = scenes.write_scenes(folder, count=6, seed=1)
    cut = folder / "images" / document["images"][2]["file_name"]
    cut.write_bytes(cut.read_bytes()[:300])
    (folder / "images" / document["images"][5]["file_name"]).unlink()
    return folder


def test_a_bad_image_stops_and_what_was_sealed_stays(
    tmp_path: Path, faulty_folder: Path, rtdetr_folder: Path
) -> None:
    with pytest.raises(ImageError, match=r"1 of 6 images are not in .*, the first is 0*125\.png"):
        run(faulty_folder, rtdetr_folder, tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()
    with pytest.raises(ImageError, match=r"cannot be decoded.*--on-bad-image skip"):
        run(faulty_folder, rtdetr_folder, tmp_path / "d.zarr", limit=5)
    summary, messages = run(faulty_folder, rtdetr_folder, tmp_path / "c.zarr", on_bad_image="skip")
    assert [s["row"] for s in summary.skipped] == [2, 5]
    assert summary.num_images == 4
    assert sum("skipped:" in m for m in messages) == 2
    cache = FeatureCache.open(tmp_path / "c.zarr")
    assert cache.rows == (0, 1, 3, 4)
    assert cache.is_complete


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_images_go_through(tmp_path: Path, rtdetr_folder: Path, mode: str) -> None:
    folder = tmp_path / "scene"
    document = scenes.write_scenes(folder, count=1, seed=2)
    entry = document["images"][0]
    picture = Image.open(folder / "images" / entry["file_name"]).convert(mode)
    entry["file_name"] = "image.jpg"
    picture.save(folder / "images/image.jpg")
    scenes.save_annotations(folder, document)
    assert run(folder, rtdetr_folder, tmp_path / "c.zarr")[0].num_images == 1


def test_one_pixel_wide_and_crowd_only_images_go_through(
    tmp_path: Path, rtdetr_folder: Path
) -> None:
    folder = tmp_path / "scene"
    document = scenes.write_scenes(folder, count=2, seed=2)
    thin, crowd = document["images"]
    Image.new("RGB", (1, 90)).save(folder / "images" / thin["file_name"])
    thin["width"], thin["height"] = 1, 90
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] == crowd["id"]]
    for annotation in document["annotations"]:
        annotation["iscrowd"] = 1
    scenes.save_annotations(folder, document)
    assert run(folder, rtdetr_folder, tmp_path / "c.zarr")[0].num_images == 2


def test_wrong_input_is_one_clear_line(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    cache = tmp_path / "c.zarr"
    with pytest.raises(DatasetError, match="image folder .*absent does not exist"):
        run(scenes_folder, rtdetr_folder, cache, images=tmp_path / "absent")
    with pytest.raises(ConfigError, match="--limit 0"):
        run(scenes_folder, rtdetr_folder, cache, limit=0)
    with pytest.raises(DetectorError, match=r"is no detector: it has no config\.json"):
        run(scenes_folder, tmp_path, cache)
    with pytest.raises(DetectorError, match="no hub id"):
        run(scenes_folder, tmp_path / "absent", cache)
    with pytest.raises(DetectorError, match="unknown detector 'hff'; did you mean 'hf'"):
        run(scenes_folder, rtdetr_folder, cache, detector="hff")
    with pytest.raises(ConfigError, match="is no device"):
        run(scenes_folder, rtdetr_folder, cache, device="gpu")
    shutil.rmtree(cache)
    with pytest.raises(CacheError, match=r"needs up to .* are free"):
        _needs_more_than_there_is(scenes_folder, rtdetr_folder, cache)
    assert not cache.exists()


def _needs_more_than_there_is(folder: Path, weights: Path, cache: Path) -> None:
    from mfdetr_pipelines import filling

    real = filling.shutil.disk_usage
    filling.shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10, 10, 10)  # type: ignore[attr-defined]
    try:
        run(folder, weights, cache)
    finally:
        filling.shutil.disk_usage = real


def test_the_same_cache_is_not_made_twice(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    cache = tmp_path / "c.zarr"
    run(scenes_folder, rtdetr_folder, cache)
    before = files_of(cache)
    summary, _ = run(scenes_folder, rtdetr_folder, cache)
    assert summary.num_extracted == 0
    assert files_of(cache) == before
    other = tmp_path / "other"
    detectors.save_rtdetr(other, seed=5)
    with pytest.raises(CacheError, match=r"already holds another cache: detector\.weights_sha256"):
        run(scenes_folder, other, cache)
    with pytest.raises(CacheError, match=r"already holds another cache: images\.count"):
        run(scenes_folder, rtdetr_folder, cache, limit=4)
    assert files_of(cache) == before


def test_images_that_were_replaced_are_told(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    folder, cache = tmp_path / "data", tmp_path / "c.zarr"
    shutil.copytree(scenes_folder, folder)
    run(folder, rtdetr_folder, cache, views=1)
    before = files_of(cache)
    assert not any("another size" in line for line in run(folder, rtdetr_folder, cache, views=1)[1])
    replaced, gone, *_ = sorted((folder / "images").iterdir())
    Image.open(replaced).convert("RGB").rotate(180).save(replaced, quality=60)
    _, told = run(folder, rtdetr_folder, cache, views=1)
    (said,) = (line for line in told if "another size" in line)
    assert said.startswith("warning: 1 images have another size in bytes than when they were extr")
    assert str(replaced) in said
    live = VerifyConfig(
        str(cache),
        live=1,
        detector=LiveDetector(str(rtdetr_folder), folder / "images"),
        device="cpu",
    )
    summary = run_verify(live, SilentReporter())
    assert said.removeprefix("warning: ") in summary.faults
    gone.unlink()
    _, told = run(folder, rtdetr_folder, cache, views=1, on_bad_image="skip")
    assert said in told
    assert files_of(cache) == before


def test_no_cuda_is_one_clear_line(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(ConfigError, match="no CUDA GPU is available here; use --device cpu"):
        run(scenes_folder, rtdetr_folder, tmp_path / "c.zarr", device="cuda")


def test_many_encoders_write_the_bytes_of_one(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside a GPU."""
    found = []
    for encoders in (1, 5):
        monkeypatch.setattr(extraction, "num_encoders", lambda _, n=encoders: n)
        cache = tmp_path / f"{encoders}.zarr"
        run(scenes_folder, rtdetr_folder, cache, preset="int8", views=1)
        found.append(files_of(cache))
    assert found[0] == found[1]
