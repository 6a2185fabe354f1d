"""Detectors that were trained on images padded to one size, as transformers' example does it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import DetectorError
from tests.support import detectors

SIDE = 160
IMAGES_HW = ((120, 200), (200, 90), (160, 160))


def padded_folder(folder: Path, save: Callable[[Path], None], **changes: object) -> Path:
    save(folder)
    path = folder / "preprocessor_config.json"
    written = {
        "size": {"max_height": SIDE, "max_width": SIDE},
        "do_pad": True,
        "pad_size": {"height": SIDE, "width": SIDE},
        **changes,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **written}))
    return folder


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (*hw, 3), dtype=np.uint8)) for hw in IMAGES_HW]


@pytest.mark.parametrize("save", [detectors.save_rtdetr, detectors.save_deformable_detr])
def test_inputs_and_boxes_are_those_of_transformers(
    tmp_path: Path, save: Callable[[Path], None]
) -> None:
    folder = padded_folder(tmp_path / "d", save)
    ours = load_detector("auto", str(folder))
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = pictures()
    inputs = processor(images, return_tensors="pt")
    pixels = torch.stack([ours.preprocess(image) for image in images])
    assert torch.equal(pixels.nan_to_num(), inputs["pixel_values"])
    assert torch.equal(~pixels[:, 0].isnan(), inputs["pixel_mask"].bool())
    with torch.no_grad():
        output, wanted = ours.forward(pixels), theirs(**inputs)
    torch.testing.assert_close(output.class_logits, wanted.logits, rtol=0, atol=2e-5)
    for index, hw in enumerate(IMAGES_HW):
        geometry = ours.input_geometry(hw)
        assert geometry.input_hw == (SIDE, SIDE)
        scale = np.array([SIDE / side for side in geometry.resized_hw[::-1]] * 2)
        expected = wanted.pred_boxes[index] * torch.tensor(scale, dtype=torch.float32)
        torch.testing.assert_close(output.boxes_cxcywh_norm[index], expected, rtol=0, atol=2e-5)
    # A box around the whole image, as the processor gives it to the training.
    everything = {"bbox": [0, 0, 200, 120], "category_id": 0, "area": 1, "iscrowd": 0}
    target = processor(
        images[0], {"image_id": 0, "annotations": [everything]}, return_tensors="pt"
    )["labels"][0]["boxes"][0]
    height, width = ours.input_geometry(IMAGES_HW[0]).resized_hw
    in_image = target * torch.tensor([SIDE / width, SIDE / height] * 2)
    torch.testing.assert_close(in_image, torch.tensor([0.5, 0.5, 1.0, 1.0]))


def test_another_padding_is_refused(tmp_path: Path) -> None:
    folder = padded_folder(tmp_path, detectors.save_rtdetr, pad_size={"height": 192, "width": 160})
    with pytest.raises(DetectorError, match=r"resize .*max_height.* and padding to .*192"):
        load_detector("auto", str(folder))


def test_padding_to_the_size_that_all_have_is_none(tmp_path: Path, rtdetr_folder: Path) -> None:
    plain = load_detector("auto", str(rtdetr_folder)).spec.preprocessing
    size = {"height": plain["height"], "width": plain["width"]}
    folder = padded_folder(tmp_path, detectors.save_rtdetr, size=size, pad_size=size)
    assert load_detector("auto", str(folder)).spec.preprocessing == plain


def test_the_setting_is_no_part_of_other_identities(rtdetr_folder: Path, tmp_path: Path) -> None:
    padded = load_detector("auto", str(padded_folder(tmp_path, detectors.save_rtdetr)))
    assert padded.spec.preprocessing["pads"] is True
    assert "pads" not in load_detector("auto", str(rtdetr_folder)).spec.preprocessing
