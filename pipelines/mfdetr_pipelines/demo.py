"""Demo: the whole way on a synthetic dataset, with a detector that comes with the package."""

from pathlib import Path

from mfdetr_cache.coco.synthetic import write_synthetic_split
from mfdetr_cache.demo import demo_detector
from mfdetr_cache.errors import MfdetrError
from mfdetr_cache.files import is_taken
from mfdetr_cache.reporter import Reporter
from mfdetr_cache.training.config import Length
from mfdetr_pipelines.config.fit import FitConfig
from mfdetr_pipelines.fit import FitSummary, run_fit

# Scenes the detector was never trained on; its script begins far above these seeds.
_TRAIN_SEED, _TRAIN_SCENES = 0, 240
_VAL_SEED, _VAL_SCENES = 10_000, 80


def run_demo(folder: Path, reporter: Reporter, length: Length | None = None) -> FitSummary:
    """Draw a dataset and fit a head to it; the folder must be new or empty."""
    if is_taken(folder):
        raise MfdetrError(f"{folder} is not empty; nothing was touched, choose another --out")
    data = folder / "data"
    reporter.say(f"drawing {_TRAIN_SCENES} + {_VAL_SCENES} scenes")
    write_synthetic_split(data, "train", _TRAIN_SEED, _TRAIN_SCENES)
    write_synthetic_split(data, "val", _VAL_SEED, _VAL_SCENES)
    config = FitConfig(
        data,
        str(demo_detector()),
        folder / "run",
        views=0,
        recipe="demo",
        length=length or Length(),
        device="cpu",
    )
    return run_fit(config, reporter)
