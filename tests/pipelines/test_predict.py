import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from mfdetr_pipelines import predict
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.predict import PredictConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.picture_files import find_images, picture_paths
from mfdetr_pipelines.predict import run_predict
from mfdetr_pipelines.train_head import run_train_head
from PIL import Image
from pycocotools import mask as coco_mask

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.errors import (
    ConfigError,
    DatasetError,
    HeadError,
    IdentityError,
    OutputError,
    StoppedError,
)
from mfdetr_cache.evaluation.segmentation import Segmentation
from mfdetr_cache.files import write_atomically
from mfdetr_cache.reporter import SilentReporter
from tests.support import detectors
from tests.support.training import small_recipe


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, drawn_cache: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "head"
    run_train_head(TrainHeadConfig(drawn_cache, out, small_recipe(steps=2)), SilentReporter())
    return out


def test_masks_are_those_of_the_evaluation(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path, head: Path
) -> None:
    """From a file, live, and from the cache: the same scores but for float16 rounding."""
    config = PredictConfig(
        (str(scenes_folder / "images"),),
        str(rtdetr_folder),
        head,
        tmp_path / "out",
        threshold=0.0,
        top_k=5,
    )
    summary = run_predict(config, SilentReporter())
    assert len(summary.images) == 8
    assert all(i.num_objects == 5 for i in summary.images)
    results = json.loads(summary.results.read_text())
    assert len(results) == 40
    run_evaluate(
        EvaluateConfig(drawn_cache, head, save_results=tmp_path / "cached.json"), SilentReporter()
    )
    cached = json.loads((tmp_path / "cached.json").read_text())
    cache = FeatureCache.open(drawn_cache)
    for image in cache:
        ours = [r for r in results if r["file_name"].endswith(image.file_name)]
        size = image.geometry.original_hw
        assert coco_mask.decode(ours[0]["segmentation"]).shape == size
        best = max(r["score"] for r in cached if r["image_id"] == image.image_id)
        assert ours[0]["score"] == pytest.approx(best, rel=0.02)
        with Image.open(tmp_path / "out" / f"{Path(image.file_name).stem}.png") as picture:
            assert (picture.height, picture.width) == size


def test_a_probable_pixel_is_one_of_the_mask(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, head: Path
) -> None:
    files = sorted((scenes_folder / "images").glob("*.png"))[:2]
    config = PredictConfig(
        tuple(map(str, files)),
        str(rtdetr_folder),
        head,
        tmp_path / "out",
        threshold=0.0,
        top_k=3,
        probabilities=True,
    )
    results = json.loads(run_predict(config, SilentReporter()).results.read_text())
    assert len({r["probabilities"] for r in results}) == 6
    between = 0
    for result in results:
        with Image.open(tmp_path / "out" / result["probabilities"]) as picture:
            assert picture.mode == "L"
            found = np.array(picture)
        mask = coco_mask.decode(result["segmentation"]).astype(bool)
        assert ((found >= 128) == mask).all()
        between += int(((found > 0) & (found < 255)).sum())
        x, y, w, h = result["bbox"]
        inside = np.zeros_like(mask)
        inside[max(0, round(y)) : round(y + h), max(0, round(x)) : round(x + w)] = True
        assert not found[~inside].any()
    assert between > 0
    # Fewer objects leave no file of an earlier run, and none of them is an input.
    run_predict(replace(config, top_k=1), SilentReporter())
    written = sorted((tmp_path / "out/probabilities").rglob("*.png"))
    assert [p.parent.name for p in written] == [f.stem for f in files]
    (tmp_path / "mine.png").write_bytes(files[0].read_bytes())
    assert find_images((str(tmp_path),), tmp_path / "out") == [tmp_path / "mine.png"]
    own = written[0].parent / "002.png"
    own.write_bytes(files[0].read_bytes())
    with pytest.raises(OutputError, match="002.png was not written by this command; nothing"):
        run_predict(config, SilentReporter())
    assert own.read_bytes() == files[0].read_bytes()
    # Nor through a link to a folder, where they would lie among one's own.
    own.unlink()
    own.parent.rename(tmp_path / "mine")
    own.parent.symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="was not written by this command"):
        run_predict(config, SilentReporter())
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_an_unreadable_image_does_not_stop_the_others(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, head: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    good = next((scenes_folder / "images").glob("*.png"))
    reporter = SilentReporter()
    files = (str(tmp_path / "broken.jpg"), str(good))
    config = PredictConfig(files, str(rtdetr_folder), head, tmp_path / "out")
    summary = run_predict(config, reporter)
    assert len(summary.images) == len(summary.unreadable) == 1
    assert sum("broken.jpg cannot be decoded" in m for m in reporter.messages) == 1
    only_bad = PredictConfig(files[:1], str(rtdetr_folder), head, tmp_path / "out")
    with pytest.raises(DatasetError, match="none of 1 images could be read"):
        run_predict(only_bad, reporter)


def test_what_was_found_before_the_disk_was_full_is_kept(
    tmp_path: Path,
    scenes_folder: Path,
    rtdetr_folder: Path,
    head: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = sorted((scenes_folder / "images").glob("*.png"))[:3]
    before = predict.save_picture

    def save(image: Image.Image, path: Path) -> None:
        if path.stem == files[1].stem:
            raise OutputError("the disk is full")
        before(image, path)

    monkeypatch.setattr(predict, "save_picture", save)
    config = PredictConfig(tuple(map(str, files)), str(rtdetr_folder), head, tmp_path / "out")
    with pytest.raises(OutputError, match="the disk is full"):
        run_predict(config, SilentReporter())
    results = tmp_path / "out" / "predictions.json"
    assert {r["file_name"] for r in json.loads(results.read_text())} == {str(files[0])}
    assert not list((tmp_path / "out").glob(".*"))
    # A later stop does not put less in its place.
    monkeypatch.setattr(predict, "save_picture", before)
    run_predict(config, SilentReporter())
    whole = results.read_bytes()
    monkeypatch.setattr(predict, "save_picture", save)
    with pytest.raises(OutputError):
        run_predict(config, SilentReporter())
    assert results.read_bytes() == whole


def test_an_empty_list_of_results_is_ours_beside_our_pictures_alone(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, head: Path
) -> None:
    file = next((scenes_folder / "images").glob("*.png"))
    results = tmp_path / "predictions.json"
    results.write_text("[]\n")
    config = PredictConfig((str(file),), str(rtdetr_folder), head, tmp_path, threshold=0.999)
    with pytest.raises(DatasetError, match=r"predictions\.json is there and was not written by"):
        run_predict(config, SilentReporter())
    assert results.read_text() == "[]\n"
    results.unlink()
    for _ in range(2):
        run_predict(config, SilentReporter())
    assert results.read_text() == "[]"


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "b/notes.txt", "a.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    patterns = [str(tmp_path / "a.webp"), str(tmp_path / "b"), str(tmp_path / "*.webp")]
    found = find_images(patterns, tmp_path / "b")
    assert [f.name for f in found] == ["a.webp", "1.png", "2.JPG"]
    with pytest.raises(DatasetError, match="no image there"):
        find_images([str(tmp_path / "*.gif")], tmp_path)
    files = [Path("x/1.png"), Path("y/1.jpg"), Path("2.png")]
    assert [p.name for p in picture_paths(files, tmp_path)] == ["1.png", "1-2.png", "2.png"]
    long = [Path(folder, "\u00e9" * 125 + ".jpg") for folder in "xy"]
    for path in picture_paths(long, tmp_path):
        write_atomically(path, b"")  # by way of a longer name


def test_pictures_beside_their_photos_are_no_photos(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, head: Path
) -> None:
    """Into the folder of the photos: none is written over, and a second time gives the same."""
    photos = tmp_path / "photos"
    originals = {}
    for file in sorted((scenes_folder / "images").iterdir())[:2]:
        originals[file.name] = file.read_bytes()
        (photos / "more").mkdir(parents=True, exist_ok=True)
        (photos / "more" / file.name).write_bytes(originals[file.name])
        (photos / file.name).write_bytes(originals[file.name])
    found = []
    for _ in range(2):
        config = PredictConfig((str(photos),), str(rtdetr_folder), head, photos, top_k=1)
        summary = run_predict(config, SilentReporter())
        found.append([(i.file, i.picture) for i in summary.images])
        written = {p for _, p in found[-1]}
        assert len(written) == len(found[-1]) == 4
        assert {p for p in photos.glob("*.png") if str(p) not in written} == {
            photos / name for name in originals
        }
        for name, data in originals.items():
            assert (photos / name).read_bytes() == (photos / "more" / name).read_bytes() == data
    assert found[0] == found[1]


def test_wrong_input_is_one_clear_line(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, head: Path
) -> None:
    images = (str(scenes_folder / "images"),)
    detectors.save_rtdetr(tmp_path / "other", seed=3)
    with pytest.raises(IdentityError, match="come from different detectors: weights_sha256"):
        run_predict(
            PredictConfig(images, str(tmp_path / "other"), head, tmp_path / "out"),
            SilentReporter(),
        )
    with pytest.raises(HeadError, match="is no trained head"):
        run_predict(
            PredictConfig(images, str(rtdetr_folder), tmp_path, tmp_path / "out"),
            SilentReporter(),
        )
    for changes, message in (
        ({"threshold": 2.0}, "--threshold 2: give a confidence from 0 to below 1"),
        ({"top_k": 0}, "--top-k 0: give 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            PredictConfig(images, str(rtdetr_folder), head, tmp_path / "out", **changes)
    assert np.array_equal(sorted(p.name for p in tmp_path.iterdir()), ["other"])


def _stop(*_: object) -> Image.Image:
    raise StoppedError("stopped")


def test_a_video_becomes_a_video(
    tmp_path: Path,
    scenes_folder: Path,
    rtdetr_folder: Path,
    head: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 121, "yuv420p"
        for file in sorted((scenes_folder / "images").iterdir())[:3]:
            with Image.open(file) as image:
                frame = av.VideoFrame.from_image(image.convert("RGB").resize((160, 121)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    files = (f"file://{tmp_path / 'clip.mp4'}",)
    config = PredictConfig(
        files, str(rtdetr_folder), head, tmp_path / "out", threshold=0.0, top_k=2
    )
    summary = run_predict(config, SilentReporter())
    (only,) = summary.images
    assert (only.frames, only.num_objects) == (3, 6)
    results = json.loads(summary.results.read_text())
    assert [r["frame"] for r in results] == [0, 0, 1, 1, 2, 2]
    with av.open(only.picture) as drawn:
        pictures = [f.to_image() for f in drawn.decode(video=0)]
    assert [p.size for p in pictures] == [(160, 120)] * 3
    # What was written is replaced as a whole, or not at all.
    before = Path(only.picture).read_bytes()
    (tmp_path / "kept.mp4").hardlink_to(only.picture)
    with monkeypatch.context() as patched:
        patched.setattr(Segmentation, "draw", _stop)
        with pytest.raises(StoppedError):
            run_predict(config, SilentReporter())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"clip.mp4", "predictions.json"}
    assert Path(only.picture).read_bytes() == before
    run_predict(config, SilentReporter())
    assert (tmp_path / "kept.mp4").read_bytes() == before
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    broken = PredictConfig((str(tmp_path / "bad.mp4"),), str(rtdetr_folder), head, tmp_path / "out")
    with pytest.raises(DatasetError, match="bad.mp4 cannot be decoded"):
        run_predict(broken, SilentReporter())
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"no decoder is installed; pip install 'mfdetr-cache\["):
        run_predict(config, SilentReporter())


def test_a_video_is_no_list_of_other_files_and_no_pipe(
    tmp_path: Path, rtdetr_folder: Path, head: Path
) -> None:
    for name, text in (
        ("list", f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/dot.mkv\n#EXT-X-ENDLIST\n"),
        ("concat", "ffconcat version 1.0\nfile dot.mkv\n"),
    ):
        (tmp_path / f"{name}.mp4").write_text(text)
    os.mkfifo(tmp_path / "pipe.mp4")
    with av.open(str(tmp_path / "dot.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 1, 1, "bgr0"
        frame = av.VideoFrame.from_image(Image.new("RGB", (1, 1)))
        container.mux([*stream.encode(frame), *stream.encode()])
    for name, said in (
        *((f"{name}.mp4", "cannot be decoded") for name in ("list", "concat")),
        ("pipe.mp4", "is no regular file"),
        ("dot.mkv", "has a side of one pixel"),
    ):
        odd = PredictConfig((str(tmp_path / name),), str(rtdetr_folder), head, tmp_path / "odd")
        with pytest.raises(DatasetError, match=f"{name} {said}"):
            run_predict(odd, SilentReporter())
    assert list((tmp_path / "odd").iterdir()) == []
