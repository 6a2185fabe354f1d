import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfdetr_cache.ops.boxes import (
    box_iou,
    cxcywh_to_xyxy,
    scale_boxes,
    xyxy_to_cxcywh,
)

side = st.floats(0.001, 1000, allow_nan=False)


@given(st.tuples(side, side, side, side))
def test_corners_and_centres_are_inverse(values: tuple[float, ...]) -> None:
    boxes_cxcywh = torch.tensor(values, dtype=torch.float64)
    back = xyxy_to_cxcywh(cxcywh_to_xyxy(boxes_cxcywh))
    assert torch.allclose(back, boxes_cxcywh, atol=1e-9)


def test_third_value_is_width_and_fourth_is_height() -> None:
    # DETR's docstring says (h, w); its code says (w, h). The code is right.
    assert cxcywh_to_xyxy(torch.tensor([0.0, 0.0, 4.0, 2.0])).tolist() == [-2, -1, 2, 1]


def test_scale_takes_height_first() -> None:
    assert scale_boxes(torch.tensor([0.5, 0.5, 1.0, 1.0]), (10, 20)).tolist() == [10, 5, 20, 10]


def test_iou_against_counted_cells() -> None:
    random = np.random.default_rng(0)
    first = np.sort(random.integers(0, 20, (6, 2, 2)), axis=1).reshape(6, 4)
    second = np.sort(random.integers(0, 20, (5, 2, 2)), axis=1).reshape(5, 4)
    iou = box_iou(torch.tensor(first).double(), torch.tensor(second).double())
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            cells_a = {(x, y) for x in range(a[0], a[2]) for y in range(a[1], a[3])}
            cells_b = {(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])}
            union = len(cells_a | cells_b)
            wanted = len(cells_a & cells_b) / union if union else 0.0
            assert iou[i, j].item() == pytest.approx(wanted)


def test_empty_boxes_have_no_overlap() -> None:
    nothing = torch.zeros(1, 4)
    assert box_iou(nothing, nothing).item() == 0
