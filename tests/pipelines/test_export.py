"""ONNX files give what torch gives, to what float32 can tell apart."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from mfdetr_pipelines.config.export import ExportConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.export import run_export
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import run_train_head
from PIL import Image

from mfdetr_cache.coco.synthetic import draw_scene
from mfdetr_cache.demo import demo_detector, demo_head
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import ConfigError, HeadError
from mfdetr_cache.evaluation.inference import predict_live
from mfdetr_cache.head.folder import load_head
from mfdetr_cache.reporter import SilentReporter
from tests.support import detectors
from tests.support.official import SMALL, write_checkpoint
from tests.support.scenes import extract_config
from tests.support.training import small_recipe

# float32 has 24 bits; a graph of some hundred operations, each rounding once, stays within some
# hundred times 2^-24 of the largest value, and an operation done in another way shows at 1e-3.
TOLERANCE = 500 * 2**-24


def trained(cache: Path, out: Path, **settings: Any) -> Path:
    recipe = small_recipe("paper", steps=2, **settings)
    run_train_head(TrainHeadConfig(cache, out, recipe), SilentReporter())
    return out


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mask_scoring": "false", "use_c1": "false", "query_o2o": "true"},
        {"image_block": "swin", "box_block": "swin", "fine_size": "32"},
        {"image_block": "convnext", "box_block": "convnext", "mask_predictor": "segmenter"},
        {"fine_size": "32", "fine_block": "points", "fine_points": "40"},
    ],
    ids=["paper", "plain", "swin", "convnext", "points"],
)
def test_a_head_of_any_kind_and_number_of_regions(
    tmp_path: Path, drawn_cache: Path, settings: dict[str, str]
) -> None:
    head = trained(drawn_cache, tmp_path / "head", **settings)
    config = ExportConfig(head, tmp_path / "head.onnx", input_hw=(160, 160))
    summary = run_export(config, SilentReporter())
    assert summary.largest_difference < TOLERANCE
    assert summary.inputs["boxes_xyxy"] == ["regions", "4"]
    assert summary.outputs["mask_logits"][0] == "regions"
    assert ("mask_iou" in summary.outputs) == (settings.get("mask_scoring") != "false")


def test_detector_and_head_give_the_masks_of_predict(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    head = trained(drawn_cache, tmp_path / "head")
    config = ExportConfig(head, tmp_path / "model.onnx", weights=str(rtdetr_folder), top_k=10)
    summary = run_export(config, SilentReporter())
    assert summary.largest_difference < TOLERANCE
    detector = load_detector("hf", str(rtdetr_folder))
    picture = load_image(sorted((scenes_folder / "images").iterdir())[0])
    pixels = detector.preprocess(picture)[None].numpy()
    session = onnxruntime.InferenceSession(str(summary.out), providers=["CPUExecutionProvider"])
    scores, boxes, logits, iou = session.run(None, {"pixel_values": pixels})
    geometry = detector.input_geometry((picture.height, picture.width))
    output = detector.forward(detector.preprocess(picture)[None])
    wanted = predict_live(load_head(head).head, output, geometry, detector.spec, scoring="class")
    best = wanted.detections.class_scores.max()
    place = np.unravel_index(scores.argmax(), scores.shape)
    assert scores[place] == pytest.approx(float(best), abs=1e-5)
    mask = 1 / (1 + np.exp(-logits[place[0]]))
    reference = wanted.mask_probs[int(wanted.mask_index[0])].numpy()
    assert np.abs(mask - reference).max() < 1e-3
    assert boxes.shape == (10, 4)
    assert iou.shape[0] == 10
    notes = session.get_modelmeta().custom_metadata_map
    assert notes["weights_sha256"] == detector.spec.weights_sha256


def test_a_trained_deformable_detr_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's; its sizes are traced as float64, for which onnxruntime cannot sample.

    Then the example of docs/python.md, which reads the file without this package.
    """
    config = ExportConfig(demo_head(), tmp_path / "model.onnx", weights=str(demo_detector()))
    summary = run_export(config, SilentReporter())
    assert summary.largest_difference < TOLERANCE
    assert summary.inputs == {"pixel_values": ["1", "3", "160", "160"]}
    page = (Path(__file__).parents[2] / "docs/python.md").read_text()
    (example,) = re.findall(r"^```python\n(import numpy.*?)^```", page, re.DOTALL | re.MULTILINE)
    picture, objects = draw_scene(3)
    picture.save(tmp_path / "photo.jpg", quality=100)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    # Its surest object is one that was drawn.
    assert example.count(">= 0.5):") == 1
    exec(example.replace(">= 0.5):", ">= 0.9):"), names)
    whole = Image.new("L", picture.size)
    whole.paste(Image.fromarray(names["mask"]), (int(names["x0"]), int(names["y0"])))
    found = np.asarray(whole) > 0
    overlaps = [(found & o["mask"]).sum() / (found | o["mask"]).sum() for o in objects]
    assert max(overlaps) > 0.5


def save_official(path: Path) -> None:
    write_checkpoint(path, replace(SMALL["h-detr-swin-t"], num_labels=3))


@pytest.mark.parametrize("save", [detectors.save_rf_detr, save_official])
def test_what_the_exporter_lacks_is_traced_otherwise(
    tmp_path: Path, scenes_folder: Path, save: Callable[[Path], None]
) -> None:
    """RF-DETR interpolates its position table in a trace, H-DETR takes proposals by index."""
    weights = str(tmp_path / "detector")
    save(Path(weights))
    config = extract_config(scenes_folder, weights, tmp_path / "c.zarr")
    labels = ("ellipse", "box", "other")
    options = replace(config.options, labels=labels, input_size=(96,), encoder_layer=None)
    run_extract(replace(config, limit=2, options=options), SilentReporter())
    head = trained(tmp_path / "c.zarr", tmp_path / "head")
    summary = run_export(
        ExportConfig(head, tmp_path / "m.onnx", (96, 128), weights=weights), SilentReporter()
    )
    assert summary.largest_difference < TOLERANCE


def test_wrong_input_is_named(
    tmp_path: Path, drawn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HeadError, match="is no trained head"):
        run_export(ExportConfig(tmp_path, tmp_path / "a.onnx"), SilentReporter())
    head = trained(drawn_cache, tmp_path / "head")
    with pytest.raises(ConfigError, match="give --input-size HxW, or --weights"):
        run_export(ExportConfig(head, tmp_path / "a.onnx"), SilentReporter())
    with pytest.raises(ConfigError, match="--input-size 640x0: give 32 or more each way"):
        run_export(ExportConfig(head, tmp_path / "a.onnx", (640, 0)), SilentReporter())
    with pytest.raises(ConfigError, match="--top-k 0: give 1 or more"):
        run_export(ExportConfig(head, tmp_path / "a.onnx", top_k=0), SilentReporter())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'mfdetr-cache\[onnx\]'"):
        run_export(ExportConfig(head, tmp_path / "a.onnx"), SilentReporter())
    assert not (tmp_path / "a.onnx").exists()
