"""Demo: all commands on a synthetic dataset, with a detector that comes with the package."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.synthetic import write_synthetic_split
from mfdetr_cache.demo import demo_detector
from mfdetr_cache.errors import MfdetrError
from mfdetr_cache.evaluation.measure import EvaluateSummary
from mfdetr_cache.evaluation.panels import prediction_panels
from mfdetr_cache.files import is_taken, writing
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.ops.devices import torch_device
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_pipelines.config.evaluate import EvaluateConfig
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.evaluate import run_evaluate
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head

ResultT = TypeVar("ResultT")

# Scenes the detector was never trained on; its script begins far above these seeds.
_TRAIN_SEED, _TRAIN_SCENES = 0, 240
_VAL_SEED, _VAL_SCENES = 10_000, 80
_NUM_PICTURES = 6


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """Result of the demo.

    Attributes:
        folder: All files.
        pictures: Image, boxes, masks and annotation of some validation images.
        seconds: Time of each stage.
        cache_bytes: Size of the two caches.
        evaluation: The metrics.
    """

    folder: Path
    pictures: tuple[Path, ...]
    seconds: dict[str, float]
    cache_bytes: int
    evaluation: EvaluateSummary


def run_demo(folder: Path, reporter: Reporter) -> DemoSummary:
    """Draw a dataset, extract, train, evaluate and draw masks; the folder must be new or empty."""
    if is_taken(folder):
        raise MfdetrError(f"{folder} is not empty; nothing was touched, choose another --out")
    seconds: dict[str, float] = {}

    def timed(stage: str, action: Callable[[], ResultT]) -> ResultT:
        started = time.perf_counter()
        result = action()
        seconds[stage] = time.perf_counter() - started
        return result

    data, train_cache, val_cache = folder / "data", folder / "train.zarr", folder / "val.zarr"
    head = folder / "head"
    timed("draw the dataset", lambda: _draw(data, reporter))
    for name, cache in (("train", train_cache), ("val", val_cache)):
        config = ExtractConfig(
            str(demo_detector()),
            cache,
            images=data / name,
            annotations=data / f"instances_{name}.json",
            device="cpu",
        )
        timed(f"extract {name}", lambda config=config: run_extract(config, reporter))  # type: ignore[misc]
    train = TrainHeadConfig(train_cache, head, build_recipe("demo", {}), device="cpu")
    timed("train the head", lambda: run_train_head(train, reporter))
    measure = EvaluateConfig(val_cache, head, device="cpu")
    evaluation = timed("evaluate", lambda: run_evaluate(measure, reporter))
    pictures = timed("pictures", lambda: _pictures(folder, val_cache, head, data / "val"))
    cache_bytes = sum(FeatureCache.open(c).stored_bytes for c in (train_cache, val_cache))
    return DemoSummary(folder, pictures, seconds, cache_bytes, evaluation)


def _draw(data: Path, reporter: Reporter) -> None:
    reporter.say(f"drawing {_TRAIN_SCENES} + {_VAL_SCENES} scenes")
    write_synthetic_split(data, "train", _TRAIN_SEED, _TRAIN_SCENES)
    write_synthetic_split(data, "val", _VAL_SEED, _VAL_SCENES)


def _pictures(folder: Path, val_cache: Path, head_folder: Path, images: Path) -> tuple[Path, ...]:
    cache, head = FeatureCache.open(val_cache), load_head(head_folder).head
    made = []
    for row in cache.rows[:_NUM_PICTURES]:
        path = folder / f"picture-{row + 1}.png"
        picture = prediction_panels(cache, row, head, images, torch_device("cpu"))
        with writing(path):
            picture.save(path)
        made.append(path)
    return tuple(made)
