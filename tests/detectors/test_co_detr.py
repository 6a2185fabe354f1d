"""Checkpoints of Co-DETR; the numbers of its own code are in tests/real/test_layout_goldens.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mfdetr_cache.detectors.conformance import DetectorConformance
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import DetectorError
from tests.support.layouts import CLASSES, config, document, random_tensors

NAME = "mmdet2_co_dino_swin"
PLAIN = config(NAME)
TO_32 = config(NAME, ("size_divisor=1", "size_divisor=32"))
PAD = "dict(type='Pad', size_divisor=1)"
SQUARE = "dict(type='Pad', size=(96, 96), pad_val=dict(img=(114, 114, 114)))"
# Large-scale jittering is tested on squares, which are attended to whole.
JITTERED = (
    PLAIN.replace(f"{PAD},", "")
    .replace("dict(type='RandomFlip')", f"dict(type='RandomFlip'), {SQUARE}")
    .replace("(1333, 800)", "(96, 96)")
    .replace("'CoDETR'", "'CoDETR', with_attn_mask=False")
)


def load(folder: Path, text: str, key: str = "config") -> Any:
    whole = document(NAME, random_tensors(NAME))
    names = {"CLASSES": CLASSES} if key == "config" else {"dataset_meta": {"classes": CLASSES}}
    torch.save({**whole, "meta": {key: text, **names}}, folder / "c.pth")
    return load_detector("auto", str(folder / "c.pth"))


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


class TestConformance(DetectorConformance):
    """Padded to multiples of 32: maps see more than the image."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make_detector(self) -> Detector:
        detector: Detector = load(self.folder, TO_32.replace("(1333, 800)", "(160, 120)"))
        return detector


def test_both_versions_of_a_configuration_are_one_detector(tmp_path: Path) -> None:
    """mmdetection 3 has the pixels' mean in the model and the steps of a test in a loader."""
    model, _ = PLAIN.split("data = dict(")
    pixels = "dict(bgr_to_rgb=True, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])"
    version_3 = model.replace(
        "'CoDETR'", f"'CoDETR', use_lsj=False, data_preprocessor={pixels}"
    ) + (
        "test_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), "
        "dict(type='Resize', scale=(1333, 800), keep_ratio=True)]))"
    )
    spec = load(tmp_path, PLAIN).spec
    assert spec == load(tmp_path, version_3, "cfg").spec
    assert (spec.num_queries, spec.label_names) == (12, CLASSES)
    assert spec.settings["final_eps"] == spec.settings["update_eps"] == 1e-3


def test_a_jittered_one_attends_to_its_grey_padding(tmp_path: Path, picture: Image.Image) -> None:
    detector = load(tmp_path, JITTERED)
    geometry = detector.input_geometry((40, 60))
    assert (geometry.resized_hw, geometry.input_hw) == ((64, 96), (96, 96))
    pixels = detector.preprocess(picture)
    assert torch.equal(pixels.isnan(), (torch.arange(96) >= 64)[None, :, None].expand(3, -1, 96))
    grey = (114 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    filled = pixels.where(~pixels.isnan(), grey[:, None, None])[None]
    with torch.no_grad():
        wanted, found = detector.model(filled), detector.forward(pixels[None])
    assert torch.equal(found.class_logits, wanted.class_logits)
    # Its boxes are relative to the square, ours to the image: 96 / 64 times as high.
    scaled = wanted.boxes_cxcywh_norm * torch.tensor([1.0, 1.5, 1.0, 1.5])
    assert torch.equal(found.boxes_cxcywh_norm, scaled)


def test_padding_to_a_multiple_is_masked(tmp_path: Path, picture: Image.Image) -> None:
    text = TO_32.replace("(1333, 800)", "(100, 50)")
    detector = load(tmp_path, text)
    geometry = detector.input_geometry((40, 60))
    assert (geometry.resized_hw, geometry.input_hw) == ((50, 75), (64, 96))
    pixels = detector.preprocess(picture)[None]
    assert torch.equal(
        pixels[0, :, :50, :75],
        load(tmp_path, PLAIN.replace("(1333, 800)", "(100, 50)")).preprocess(picture),
    )
    padding = pixels[:, 0].isnan()
    with torch.no_grad():
        wanted, found = detector.model(pixels.nan_to_num(), padding), detector.forward(pixels)
    assert torch.equal(found.boxes_cxcywh_norm, wanted.boxes_cxcywh_norm)
    assert detector.spec.preprocessing["pad_multiple"] == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            TO_32.replace("'CoDETR'", "'CoDETR', with_attn_mask=False"),
            "pad_size_divisor = 32 is not read",
        ),
        (TO_32.replace("=32", "=0"), "padded to multiples of 0"),
        (TO_32.replace("keep_ratio=True", "keep_ratio=False"), "pad_size_divisor = 32 is not read"),
        (JITTERED.replace("with_attn_mask=False", "with_attn_mask=True"), "step = Pad is not read"),
        (JITTERED.replace("(96, 96), pad", "(96, 128), pad"), "step = Pad is not read"),
        (JITTERED.replace("114, 114, 114", "114, 114, 0"), "step = Pad is not read"),
        (PLAIN.replace(PAD, SQUARE), "step = Pad after Normalize is not read"),
        (PLAIN.replace("'CoDETR'", "'CoDETR', eval_module='one-stage'"), "eval_module = one-stage"),
        (PLAIN.replace("'CoDINOHead'", "'CoOtherHead'"), "bbox_head.type = CoOtherHead is not r"),
        (
            PLAIN.replace("'SwinTransformerV1'", "'ViT'"),
            "backbone.type = ViT is not read; .* and Co-DETR",
        ),
    ],
)
def test_configurations_that_are_not_followed(tmp_path: Path, text: str, message: str) -> None:
    assert text not in (PLAIN, JITTERED)
    with pytest.raises(DetectorError, match=message):
        load(tmp_path, text)


def test_what_only_its_training_uses_is_kept_beside_tuned_weights(tmp_path: Path) -> None:
    detector = load(tmp_path, PLAIN)
    with torch.no_grad():
        for parameter in detector.tunable_parameters("all"):
            parameter.add_(0.01)
    again: Any = load_detector("dino", detector.save_weights(tmp_path / "tuned"))
    pixels = torch.randn(1, 3, 64, 96)
    assert torch.equal(again.forward(pixels).class_logits, detector.forward(pixels).class_logits)
    written = torch.load(tmp_path / "tuned" / "checkpoint.pth", weights_only=True)
    assert written["state_dict"].keys() == random_tensors(NAME).keys()
