from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from mfdetr_cache.detectors.sam import SamPrompter
from tests.support.sams import save_sam


@pytest.mark.parametrize("kind", ["sam", "sam_hq", "sam2"])
def test_every_box_gets_its_own_mask_in_the_image(
    kind: Literal["sam", "sam_hq", "sam2"], tmp_path: Path
) -> None:
    """Whatever else is asked for, and in which order; at the image's size, which is no square."""
    save_sam(kind, tmp_path)
    prompter = SamPrompter(str(tmp_path), torch.device("cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    boxes = np.array([[5, 5, 40, 50], [10, 8, 80, 55], [50, 30, 60, 40]], np.float32)
    masks, iou = prompter(image, boxes)
    assert (masks.shape, masks.dtype, iou.shape) == ((3, 60, 90), np.bool_, (3,))
    assert len({m.tobytes() for m in masks}) == 3
    again, iou_again = prompter(image, boxes[::-1])
    # Random weights leave logits near zero: a few pixels may fall to the other side.
    assert (again[::-1] != masks).mean() < 1e-3
    np.testing.assert_allclose(iou_again[::-1], iou, atol=1e-5)
    alone, iou_alone = prompter(image, boxes[1:2])
    assert (alone[0] != masks[1]).mean() < 1e-3
    np.testing.assert_allclose(iou_alone, iou[1:2], atol=1e-5)
