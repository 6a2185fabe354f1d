"""Predict: masks for image and video files, by the frozen detector and a trained head."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from mfdetr_cache.coco.image_files import open_image
from mfdetr_cache.coco.json_file import read_json
from mfdetr_cache.detectors.images import load_with_oddities
from mfdetr_cache.errors import DatasetError, ImageError
from mfdetr_cache.files import make_folder, whole_file, write_atomically, writing
from mfdetr_cache.model import MaskFrozenDETR, Segmentation, TimedSegmentation
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.config.predict import PredictConfig
from mfdetr_pipelines.picture_files import VIDEO_SUFFIXES
from mfdetr_pipelines.predict_video import (
    WRITTEN_BY,
    Video,
    was_written_by_predict,
)

RESULTS_FILE = "predictions.json"


@dataclass(frozen=True, slots=True)
class PredictedImage:
    """Predictions for one file.

    Attributes:
        file: The image or video.
        picture: The file with masks drawn on it.
        num_objects: Objects kept.
        detector_ms: Detector time in milliseconds.
        head_ms: Mask network time in milliseconds.
        frames: Number of frames; for a video, times are means over them.
    """

    file: str
    picture: str
    num_objects: int
    detector_ms: float
    head_ms: float
    frames: int = 1


@dataclass(frozen=True, slots=True)
class PredictSummary:
    """Results of all files.

    Attributes:
        images: One entry per readable file.
        unreadable: One line per unreadable file.
        results: COCO results.
    """

    images: tuple[PredictedImage, ...]
    unreadable: tuple[str, ...]
    results: Path


def run_predict(config: PredictConfig, reporter: Reporter) -> PredictSummary:
    """Segment image and video files; unreadable ones are reported and skipped.

    DatasetError if no file can be read, IdentityError if the head was trained with another
    detector.
    """
    files = config.files
    results_path = config.out / RESULTS_FILE
    _require_ours(results_path)
    pictures = picture_paths(files, config.out)
    keep_freed_memory()
    model = MaskFrozenDETR.from_pretrained(
        config.weights, config.head, kind=config.detector, device=config.device
    )
    make_folder(config.out)
    done: list[PredictedImage] = []
    unreadable: list[str] = []
    results: list[dict[str, object]] = []
    oddities: Counter[str] = Counter()
    reporter.start("predict", len(files), "files")
    for file, picture in zip(files, pictures, strict=True):
        try:
            if file.suffix.lower() in VIDEO_SUFFIXES:
                with writing(picture):
                    one = _video(config, model, file, picture, results, reporter)
                done.append(one)
            else:
                loaded = load_with_oddities(file)
                found = model.timed(loaded.image, config.threshold, config.top_k)
                drawn = found.result.draw(loaded.image)
                with whole_file(picture) as partial:
                    drawn.save(partial, "PNG", pnginfo=_mark())
                results += _results(file, found.result)
                done.append(_entry(file, picture, [found]))
                oddities.update(loaded.oddities)
        except ImageError as error:
            unreadable.append(str(error))
            reporter.warn(str(error))
        reporter.advance()
    reporter.finish()
    if not done:
        raise DatasetError(f"none of {len(files)} images could be read: {unreadable[0]}")
    for what, count in oddities.items():
        reporter.warn(f"{count} of {len(files)}: {what}")
    write_atomically(results_path, json.dumps(results).encode())
    return PredictSummary(tuple(done), tuple(unreadable), results_path)


def _video(
    config: PredictConfig,
    model: MaskFrozenDETR,
    file: Path,
    out: Path,
    results: list[dict[str, object]],
    reporter: Reporter,
) -> PredictedImage:
    """Segment every frame of a video and write an annotated copy."""
    timed = []
    with Video(file, out) as video:
        reporter.say(f"{file}: {video.frames or 'some'} pictures")
        for number, image in enumerate(video):
            found = model.timed(image, config.threshold, config.top_k)
            video.add(found.result.draw(image))
            results += [{**r, "frame": number} for r in _results(file, found.result)]
            timed.append(found)
    if not timed:
        raise ImageError(f"video {file} holds no picture")
    return _entry(file, out, timed)


def _entry(file: Path, picture: Path, found: Sequence[TimedSegmentation]) -> PredictedImage:
    return PredictedImage(
        str(file),
        str(picture),
        sum(len(f.result) for f in found),
        1000 * sum(f.detector_seconds for f in found) / len(found),
        1000 * sum(f.head_seconds for f in found) / len(found),
        len(found),
    )


def picture_paths(files: Sequence[Path], out: Path) -> list[Path]:
    """The output file of every image, all different: ``.png``, or ``.mp4`` for a video.

    Existing files are replaced only if this command wrote them.
    """
    inputs = {file.resolve() for file in files}
    # Some file systems take names that differ in case for the same.
    taken: set[str] = set()
    paths = []
    for file in files:
        ending = ".mp4" if file.suffix.lower() in VIDEO_SUFFIXES else ".png"
        path, number = out / f"{file.stem}{ending}", 2
        while path.name.casefold() in taken or path.resolve() in inputs or not _is_ours(path):
            path, number = out / f"{file.stem}-{number}{ending}", number + 1
        taken.add(path.name.casefold())
        paths.append(path)
    return paths


def _mark() -> PngInfo:
    """PNG metadata that marks an image as written by this command."""
    mark = PngInfo()
    mark.add_text("Software", WRITTEN_BY)
    return mark


def _is_ours(path: Path) -> bool:
    """Whether a file is absent or was written by this command."""
    if not path.exists() and not path.is_symlink():
        return True
    if path.suffix == ".mp4":
        return was_written_by_predict(path)
    try:
        with open_image(path) as picture:
            return picture.info.get("Software") == WRITTEN_BY
    except ImageError:
        return False


def _require_ours(path: Path) -> None:
    """Refuse to overwrite a results file that this command did not write."""
    if not path.exists():
        return
    try:
        found = read_json(path, "results file", "").document
    except DatasetError:
        found = None
    keys = {"file_name", "category", "segmentation"}
    ours = isinstance(found, list) and all(isinstance(r, dict) and keys <= r.keys() for r in found)
    if not ours:
        raise DatasetError(
            f"{path} is there and was not written by predict; nothing was touched, choose another "
            "--out"
        )


def _results(file: Path, found: Segmentation) -> list[dict[str, object]]:
    entries = []
    for name, result in zip(found.names, found.to_coco(image_id=0), strict=True):
        del result["image_id"]
        entries.append({"file_name": str(file), "category": name, **result})
    return entries
