"""``--amp bf16``: another detector to every cache and head, with nearly the same numbers."""

from pathlib import Path

import pytest
import torch
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.cache import VerifyConfig
from mfdetr_pipelines.config.shared import LiveDetector
from mfdetr_pipelines.extract import run_extract
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.registry import load_detector, load_same_detector
from mfdetr_cache.errors import CacheError
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.reporter import SilentReporter
from tests.support import detectors, scenes

AMP = DetectorOptions(amp="bf16")


@pytest.fixture(params=["rtdetr", "deformable_detr"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    getattr(detectors, f"save_{request.param}")(tmp_path / "detector")
    return tmp_path / "detector"


def test_outputs_are_float32_and_near(folder: Path) -> None:
    exact, fast = load_detector("hf", str(folder)), load_detector("hf", str(folder), AMP)
    pixels = exact.preprocess(Image.effect_noise((120, 90), 60).convert("RGB"))[None]
    one, two = exact.forward(pixels), fast.forward(pixels)
    for name in exact.spec.maps:
        ours, theirs = two.maps[name.name], one.maps[name.name]
        assert ours.dtype == torch.float32
        # A bfloat16 has eight bits; some layers of it add up to a few per cent of the spread.
        assert 0 < float((ours - theirs).abs().mean()) < 0.05 * float(theirs.std())
    assert {t.dtype for t in (two.class_logits, two.boxes_cxcywh_norm, two.queries)} == {
        torch.float32
    }


def test_it_is_part_of_the_identity(
    scenes_folder: Path, rtdetr_folder: Path, tmp_path: Path, drawn_cache: Path
) -> None:
    path = tmp_path / "amp.zarr"
    config = scenes.extract_config(scenes_folder, str(rtdetr_folder), path, options=AMP)
    run_extract(config, SilentReporter())
    cache = FeatureCache.open(path)
    assert cache.cache_id != FeatureCache.open(drawn_cache).cache_id
    again = load_same_detector("hf", str(rtdetr_folder), detector_identity(cache.spec), "cache")
    assert again.spec == cache.spec
    source = LiveDetector(str(rtdetr_folder), scenes_folder / "images")
    found = run_verify(VerifyConfig(path, live=2, detector=source), SilentReporter())
    assert not found.faults
    exact = scenes.extract_config(scenes_folder, str(rtdetr_folder), path)
    with pytest.raises(CacheError, match="already holds another cache: detector.settings"):
        run_extract(exact, SilentReporter())
