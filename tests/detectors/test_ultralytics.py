"""RT-DETR in files of ultralytics, which hold a pickled module and not a state dict."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.preprocess import opencv_bilinear
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import DetectorError
from tests.support.ultralytics import GOLDEN, ultralytics_weights

# In float32 their code differs from itself in float64 by 8e-7, by 2e-7 in boxes.
ATOL, BOX_ATOL = 1e-5, 2e-6
OPTIONS = DetectorOptions(num_queries=20, input_size=(128, 160))


def _pixels() -> torch.Tensor:
    values = np.random.default_rng(7).uniform(0, 1, (1, 3, 128, 160))
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture
def detection_model(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """A class that pickles by the name of ultralytics', which is not installed."""

    class RTDETRDetectionModel(nn.Module):
        names: dict[int, str]

    package = ModuleType("ultralytics")
    vars(package)["RTDETRDetectionModel"] = RTDETRDetectionModel
    RTDETRDetectionModel.__module__ = "ultralytics"
    RTDETRDetectionModel.__qualname__ = "RTDETRDetectionModel"
    monkeypatch.setitem(sys.modules, "ultralytics", package)
    return RTDETRDetectionModel


def _module(weights: dict[str, torch.Tensor]) -> nn.Module:
    """Modules in modules that have these tensors, as parameters and buffers."""
    root = nn.Module()
    for name, value in weights.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if "running" in last:
            module.register_buffer(last, value)
        else:
            module.register_parameter(last, nn.Parameter(value))
    return root


def _model(kind: type[nn.Module], add: float = 0.0) -> nn.Module:
    model = kind()
    weights = {name: value + add for name, value in ultralytics_weights().items()}
    model.add_module("model", _module(weights).get_submodule("model"))
    model.names = {0: "elephant", 1: "bear", 2: "zebra"}  # type: ignore[assignment]
    return model


def _save(kind: type[nn.Module], path: Path, **document: Any) -> Path:
    document = {"model": _model(kind), "ema": None, "train_args": {"imgsz": 640}} | document
    torch.save(document, path)
    return path


def test_a_file_gives_the_numbers_of_ultralytics(
    detection_model: type[nn.Module], tmp_path: Path
) -> None:
    path = _save(detection_model, tmp_path / "best.pt")
    detector: Any = load_detector("auto", str(path), OPTIONS)
    assert detector.spec.name == "rt-detr-ultralytics"
    assert detector.spec.label_names == ("elephant", "bear", "zebra")
    expected = np.load(GOLDEN)
    with torch.no_grad():
        output = detector.forward(_pixels())
    maps = {name: values[:, ::4, ::2, ::2] for name, values in output.maps.items()}
    maps["c1"] = output.maps["c1"][:, ::4, ::4, ::4]
    found = {"logits": output.class_logits, "boxes": output.boxes_cxcywh_norm, **maps}
    found["queries"] = output.queries
    for name in set(expected.files) - {"about"}:
        atol = BOX_ATOL if name == "boxes" else ATOL
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)


def test_images_are_stretched_as_ultralytics_does(
    detection_model: type[nn.Module], tmp_path: Path
) -> None:
    """To a square of the size it was trained with, by OpenCV and without normalisation."""
    path = _save(detection_model, tmp_path / "best.pt", train_args={"imgsz": 320})
    detector = load_detector("auto", str(path), DetectorOptions(num_queries=20))
    image = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    wanted = opencv_bilinear(image, (320, 320)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(detector.preprocess(Image.fromarray(image)), wanted, atol=1e-7)


def test_averaged_weights_come_first(detection_model: type[nn.Module], tmp_path: Path) -> None:
    """While a training goes on, ultralytics keeps them beside the last ones, both in float16."""
    averaged = _model(detection_model, 0.25).half()
    path = _save(detection_model, tmp_path / "last.pt", ema=averaged)
    detector: Any = load_detector("auto", str(path), OPTIONS)
    found = detector.state_dict()["model.model.decoder.class_embed.1.bias"]
    wanted = ultralytics_weights()["model.28.dec_score_head.1.bias"] + 0.25
    np.testing.assert_array_equal(found, wanted.half().float())


def test_a_state_dict_and_a_module_alone_are_read(
    detection_model: type[nn.Module], tmp_path: Path
) -> None:
    torch.save(ultralytics_weights(), tmp_path / "weights.pth")
    torch.save(_model(detection_model), tmp_path / "module.pt")
    for name in ("weights.pth", "module.pt"):
        assert load_detector("auto", str(tmp_path / name), OPTIONS).spec.num_labels == 3


def test_other_models_of_ultralytics_are_refused(tmp_path: Path) -> None:
    weights = {k: v for k, v in ultralytics_weights().items() if not k.startswith("model.0.")}
    torch.save(weights, tmp_path / "resnet.pt")
    with pytest.raises(DetectorError, match="neither rtdetr-l nor rtdetr-x"):
        load_detector("auto", str(tmp_path / "resnet.pt"), OPTIONS)


def test_modules_without_an_end_are_refused(
    detection_model: type[nn.Module], tmp_path: Path
) -> None:
    model = detection_model()
    model.add_module("again", model)
    torch.save({"model": model}, tmp_path / "endless.pt")
    with pytest.raises(DetectorError, match="without an end"):
        load_detector("auto", str(tmp_path / "endless.pt"), OPTIONS)
