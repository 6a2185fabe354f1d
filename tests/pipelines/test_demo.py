from pathlib import Path

import pytest
from mfdetr_pipelines import demo
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.extract import run_extract
from PIL import Image

from mfdetr_cache.coco.synthetic import write_synthetic_split
from mfdetr_cache.demo import demo_detector
from mfdetr_cache.errors import MfdetrError
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.config import Length


def test_the_detector_that_comes_along_sees_the_scenes(tmp_path: Path) -> None:
    """On scenes that neither its training nor the demo uses."""
    annotations = write_synthetic_split(tmp_path, "heldout", 60_000, 20)
    config = ExtractConfig(
        str(demo_detector()),
        tmp_path / "c.zarr",
        images=tmp_path / "heldout",
        annotations=annotations,
    )
    assert run_extract(config, SilentReporter()).box.AP > 0.45


def test_the_detector_is_small() -> None:
    size = sum(f.stat().st_size for f in demo_detector().iterdir())
    assert size < 8 * 2**20


def test_the_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps, on fewer scenes and training steps."""
    monkeypatch.setattr(demo, "_TRAIN_SCENES", 16)
    monkeypatch.setattr(demo, "_VAL_SCENES", 6)
    summary = demo.run_demo(tmp_path / "demo", SilentReporter(), Length(4))
    assert summary.evaluation.num_images == 6
    assert summary.evaluation.box.AP > 0.3
    assert set(summary.seconds) >= {"extract train", "train the head", "evaluate"}
    assert len(summary.pictures) == 6
    with Image.open(summary.pictures[0]) as picture:
        assert picture.width > 2 * picture.height
    with pytest.raises(MfdetrError, match="is not empty; nothing was touched"):
        demo.run_demo(tmp_path / "demo", SilentReporter())
