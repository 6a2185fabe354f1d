"""Predict: masks for image files, by the frozen detector and a trained head."""

import glob
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.live import live_image
from mfdetr_cache.detectors.options import options_of
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.devices import torch_device
from mfdetr_cache.errors import DatasetError, ImageError, MfdetrError
from mfdetr_cache.evaluation.inference import predict_masks
from mfdetr_cache.evaluation.objects import ShownObject, shown_objects
from mfdetr_cache.evaluation.overlay import draw_overlay
from mfdetr_cache.head.folder import load_head, write_atomically
from mfdetr_cache.identity import detector_identity, require_same
from mfdetr_cache.masks import encode_mask
from mfdetr_cache.protocols import Reporter

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
RESULTS_FILE = "predictions.json"


@dataclass(frozen=True, slots=True)
class PredictConfig:
    """What ``mfdetr predict`` is told.

    Attributes:
        images: Files, folders and glob patterns.
        detector: Name of the detector.
        weights: Its folder, file or hub id.
        head: Run folder of a trained head.
        out: Where pictures and results go.
        threshold: Least confidence of what is kept.
        top_k: At most so many objects per image.
        device: Where to compute.
    """

    images: tuple[str, ...]
    detector: str
    weights: str
    head: Path
    out: Path
    threshold: float = 0.25
    top_k: int = 100
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class PredictedImage:
    """What was found in one image.

    Attributes:
        file: The image.
        picture: The picture with masks on it.
        num_objects: How many objects were kept.
        detector_ms: Milliseconds in the detector.
        head_ms: Milliseconds in the mask network.
    """

    file: str
    picture: str
    num_objects: int
    detector_ms: float
    head_ms: float


@dataclass(frozen=True, slots=True)
class PredictSummary:
    """What was done.

    Attributes:
        images: One entry per image that could be read.
        unreadable: One line per image that could not.
        results: COCO results of all images.
    """

    images: tuple[PredictedImage, ...]
    unreadable: tuple[str, ...]
    results: Path


def run_predict(config: PredictConfig, reporter: Reporter) -> PredictSummary:
    """Segment image files.

    Args:
        config: What to do.
        reporter: Who is told about progress.

    Returns:
        What was found. An unreadable image is reported and the others go on.

    Raises:
        DatasetError: If there is no image, or none can be read.
        IdentityError: If the head was trained with another detector.
    """
    files = find_images(config.images)
    folder = load_head(config.head)
    detector = load_detector(config.detector, config.weights, options_of(folder.detector))
    require_same(
        folder.detector,
        f"head {config.head}",
        detector_identity(detector.spec),
        f"detector {config.weights}",
    )
    device = torch_device(config.device)
    detector, head = detector.to(device), folder.head.to(device)
    _make_folder(config.out)
    done: list[PredictedImage] = []
    unreadable: list[str] = []
    results: list[dict[str, object]] = []
    reporter.start("predict", len(files), "images")
    for file, name in zip(files, picture_names(files), strict=True):
        try:
            image = load_image(file)
        except ImageError as error:
            unreadable.append(str(error))
            reporter.warn(str(error))
            reporter.advance()
            continue
        started = time.perf_counter()
        live = live_image(detector, image, file.name, device)
        between = time.perf_counter()
        prediction = predict_masks(head, live, detector.spec, device)
        ended = time.perf_counter()
        objects = shown_objects(
            prediction,
            folder.document["label_categories"],
            {int(c["id"]): str(c["name"]) for c in folder.document["categories"]},
            live.geometry.original_hw,
            config.threshold,
            config.top_k,
        )
        picture = config.out / name
        draw_overlay(image, [o.to_item() for o in reversed(objects)]).save(picture)
        results += [_result(file, o) for o in objects]
        times = (1000 * (between - started), 1000 * (ended - between))
        done.append(PredictedImage(str(file), str(picture), len(objects), *times))
        reporter.advance()
    reporter.finish()
    if not done:
        raise DatasetError(f"none of {len(files)} images could be read: {unreadable[0]}")
    path = config.out / RESULTS_FILE
    write_atomically(path, json.dumps(results).encode())
    return PredictSummary(tuple(done), tuple(unreadable), path)


def find_images(patterns: Sequence[str]) -> list[Path]:
    """The image files that files, folders and glob patterns stand for.

    Args:
        patterns: As typed.

    Returns:
        Files in the order given, folders sorted, each once.

    Raises:
        DatasetError: If one of them stands for nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES)
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(pattern, recursive=True))  # noqa: PTH207
        if not files:
            raise DatasetError(f"{pattern}: no image there; give files, folders or patterns")
        found.update(dict.fromkeys(files))
    return list(found)


def picture_names(files: Sequence[Path]) -> list[str]:
    """A name for the picture of every image; images of the same name keep theirs apart.

    Args:
        files: The images.

    Returns:
        File names ending in ``.png``, all different.
    """
    taken: set[str] = set()
    names = []
    for file in files:
        name, number = f"{file.stem}.png", 2
        while name in taken:
            name, number = f"{file.stem}-{number}.png", number + 1
        taken.add(name)
        names.append(name)
    return names


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MfdetrError(f"--out {path} cannot be made: {error.strerror}") from error


def _result(file: Path, found: ShownObject) -> dict[str, object]:
    rle = encode_mask(found.mask)
    x0, y0, x1, y1 = found.box_xyxy
    return {
        "file_name": str(file),
        "category_id": found.category_id,
        "category": found.name,
        "score": found.confidence,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }
