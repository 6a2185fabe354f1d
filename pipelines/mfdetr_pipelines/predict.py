"""Predict: masks for image and video files, by the frozen detector and a trained head."""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL import Image

from mfdetr_cache.coco.json_file import read_json
from mfdetr_cache.detectors.images import load_with_oddities
from mfdetr_cache.errors import DatasetError, ImageError, OutputError
from mfdetr_cache.evaluation.segmentation import Segmentation, TimedSegmentation
from mfdetr_cache.files import make_folder, owned_results, whole_file, write_atomically
from mfdetr_cache.model import MaskFrozenDETR
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.read_ahead import read_ahead
from mfdetr_cache.reporter import Reporter
from mfdetr_pipelines.config.predict import PredictConfig
from mfdetr_pipelines.picture_files import (
    holds_pictures_of_ours,
    is_video,
    picture_paths,
    require_ours,
    save_picture,
)
from mfdetr_pipelines.predict_video import Video

RESULTS_FILE = "predictions.json"
PROBABILITIES = "probabilities"
# Threads that draw; pictures that are being drawn while the networks see the next ones.
_THREADS, _BEHIND = 2, 4

ItemT = TypeVar("ItemT")
_Pair = tuple[ItemT, TimedSegmentation | ImageError]


@dataclass(frozen=True, slots=True)
class PredictedImage:
    """Predictions for one file.

    Attributes:
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
    """Readable files, and a line for each of the others."""

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
    if config.probabilities:
        require_ours(config.out / PROBABILITIES)
        if any(map(is_video, files)):
            reporter.warn("--probabilities: images get them, videos do not")
    keep_freed_memory()
    model = MaskFrozenDETR.from_pretrained(
        config.weights,
        config.head,
        kind=config.detector,
        device=config.device,
        prompt=config.prompt,
    )
    if model.unfinished:
        reporter.warn(model.unfinished)
    with owned_results(config.out), ThreadPoolExecutor(_THREADS, "draw") as pool:
        reporter.start("predict", len(files), "files")
        run = _Run(config, model, pool, reporter)
        pairs = zip(files, pictures, strict=True)
        try:
            for are_videos, group in itertools.groupby(pairs, lambda pair: is_video(pair[0])):
                ours = dict(group)
                run.videos(ours) if are_videos else run.images(ours)
        except BaseException:
            # Of a full disk or a signal: what was found is kept, but not in place of more.
            if run.done and not results_path.exists():
                with contextlib.suppress(OutputError):
                    run.write_results(results_path)
            raise
        if not run.done:
            raise DatasetError(f"none of {len(files)} images could be read: {run.unreadable[0]}")
        run.write_results(results_path)
    reporter.finish()
    for what, count in run.oddities.items():
        reporter.warn(f"{count} of {len(files)}: {what}")
    return PredictSummary(tuple(run.done), tuple(run.unreadable), results_path)


@dataclass(slots=True)
class _Run:
    """Files through a model, and what was found so far; ``pool`` draws beside the networks."""

    config: PredictConfig
    model: MaskFrozenDETR
    pool: ThreadPoolExecutor
    reporter: Reporter
    done: list[PredictedImage] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    results: list[dict[str, object]] = field(default_factory=list)
    oddities: Counter[str] = field(default_factory=Counter)

    def images(self, pictures: dict[Path, Path]) -> None:
        """Segment image files; each is drawn into its picture."""
        oddities: dict[Path, tuple[str, ...]] = {}

        def load(file: Path) -> Image.Image:
            loaded = load_with_oddities(file)
            oddities[file] = loaded.oddities
            return loaded.image

        def draw(pair: _Pair[Path]) -> Callable[[], _Pair[Path]]:
            file, found = pair
            if isinstance(found, ImageError):
                return lambda: pair
            return self.pool.submit(self._draw, pictures[file], file, found).result

        for file, found in read_ahead(draw, self._segmented(pictures, load), _BEHIND):
            if isinstance(found, ImageError):
                self._is_unreadable(found)
            else:
                entries = _results(file, found.result)
                if self.config.probabilities:
                    for entry, path in zip(
                        entries, _probability_files(pictures[file], len(entries)), strict=True
                    ):
                        entry["probabilities"] = str(path.relative_to(self.config.out))
                self.results += entries
                self.done.append(_entry(file, pictures[file], [found]))
                self.oddities.update(oddities.pop(file))
            self.reporter.advance()

    def _draw(
        self, picture: Path, file: Path, found: TimedSegmentation
    ) -> tuple[Path, TimedSegmentation]:
        save_picture(found.result.draw(found.picture), picture)
        if self.config.probabilities:
            _write_probabilities(picture, found.result)
        return file, found

    def videos(self, copies: dict[Path, Path]) -> None:
        """Segment videos, each into an annotated copy."""
        for file, copy in copies.items():
            try:
                with whole_file(copy) as partial:
                    found = self._video(file, partial)
                self.done.append(_entry(file, copy, found))
            except ImageError as error:
                self._is_unreadable(error)
            self.reporter.advance()

    def _video(self, file: Path, copy: Path) -> list[TimedSegmentation]:
        def draw(pair: _Pair[Image.Image]) -> Callable[[], tuple[Image.Image, TimedSegmentation]]:
            frame, found = pair
            assert isinstance(found, TimedSegmentation)  # frames are decoded when they come
            drawing = self.pool.submit(found.result.draw, frame)
            return lambda: (drawing.result(), found)

        timed: list[TimedSegmentation] = []
        with Video(file, copy) as video:
            self.reporter.say(f"{file}: {video.frames or 'some'} pictures")
            frames = self._segmented(video, lambda frame: frame)
            for drawn, found in read_ahead(draw, frames, _BEHIND):
                video.add(drawn)
                entries = _results(file, found.result)
                self.results += [{**entry, "frame": len(timed)} for entry in entries]
                timed.append(found)
        if not timed:
            raise ImageError(f"video {file} holds no picture")
        return timed

    def _segmented(
        self, items: Iterable[ItemT], load: Callable[[ItemT], Image.Image]
    ) -> Iterator[_Pair[ItemT]]:
        return self.model.stream(items, load, self.config.threshold, self.config.top_k)

    def write_results(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.results).encode())

    def _is_unreadable(self, error: ImageError) -> None:
        self.unreadable.append(str(error))
        self.reporter.warn(str(error))


def _probability_files(picture: Path, count: int) -> list[Path]:
    """The files of a picture's objects, by falling score."""
    folder = picture.parent / PROBABILITIES / picture.stem
    return [folder / f"{number:03d}.png" for number in range(1, count + 1)]


def _write_probabilities(picture: Path, found: Segmentation) -> None:
    folder = picture.parent / PROBABILITIES / picture.stem
    make_folder(folder)
    # An earlier run may have found more objects.
    for old in folder.glob("*.png"):
        old.unlink()
    for index, path in enumerate(_probability_files(picture, len(found))):
        save_picture(Image.fromarray(found.probabilities(index)), path)


def _entry(file: Path, picture: Path, found: Sequence[TimedSegmentation]) -> PredictedImage:
    return PredictedImage(
        str(file),
        str(picture),
        sum(len(f.result) for f in found),
        1000 * sum(f.detector_seconds for f in found) / len(found),
        1000 * sum(f.head_seconds for f in found) / len(found),
        len(found),
    )


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
    # A list of nothing says nothing of itself, but stands beside the pictures of what it was
    # not found in.
    if not (ours and (found or holds_pictures_of_ours(path.parent))):
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
