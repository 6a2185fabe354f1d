from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mfdetr_cache.coco.augmentation import (
    ViewTransform,
    identity_transform,
    sample_transform,
    transform_ground_truth,
    transform_image,
)
from mfdetr_cache.ops.masks import crop_run_lengths, decode_run_lengths
from mfdetr_cache.types import GroundTruth
from tests.support.rectangles import runs_of


def truth_of(masks: list[np.ndarray]) -> GroundTruth:
    boxes, runs = [], []
    for mask in masks:
        y, x = np.nonzero(mask)
        boxes.append((x.min(), y.min(), x.max() + 1, y.max() + 1))
        runs.append(runs_of(mask))
    count = len(masks)
    return GroundTruth(
        np.arange(count),
        np.ones(count, np.int64),
        np.zeros(count, np.int64),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([float(m.sum()) for m in masks]),
        np.zeros(count, np.bool_),
        tuple(runs),
    )


@given(st.data())
def test_a_window_of_a_mask_is_the_window_of_its_bitmap(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random((height, width)) < 0.5
    x0, y0 = data.draw(st.integers(-5, 15)), data.draw(st.integers(-5, 15))
    x1, y1 = x0 + data.draw(st.integers(1, 12)), y0 + data.draw(st.integers(1, 12))
    flip = data.draw(st.booleans())
    canvas = np.zeros((50, 50), dtype=bool)
    canvas[20 : 20 + height, 20 : 20 + width] = mask
    wanted = canvas[20 + y0 : 20 + y1, 20 + x0 : 20 + x1]
    wanted = wanted[:, ::-1] if flip else wanted
    found = crop_run_lengths(runs_of(mask), (height, width), (x0, y0, x1, y1), flip=flip)
    assert (decode_run_lengths(found, wanted.shape) == wanted).all()
    # Canonical, as pycocotools writes them.
    assert found.tolist() == runs_of(wanted).tolist()


@pytest.mark.parametrize(
    "transform",
    [
        ViewTransform((0, 0, 40, 30), flip=True, shortest_edge=0),
        ViewTransform((7, 3, 29, 30), flip=False, shortest_edge=480),
        ViewTransform((7, 3, 29, 30), flip=True, shortest_edge=480),
        ViewTransform((-5, 2, 60, 45), flip=True, shortest_edge=0),
    ],
)
def test_picture_and_ground_truth_stay_together(transform: ViewTransform) -> None:
    """An object painted into the picture is found under its transformed mask and box."""
    masks = [np.zeros((30, 40), dtype=bool) for _ in range(3)]
    masks[0][5:20, 10:25] = True
    masks[0][5:8, 10:14] = False
    masks[1][25:30, 0:12] = True
    masks[2][0:2, 0:3] = True
    pixels = np.full((30, 40, 3), 10, np.uint8)
    for number, mask in enumerate(masks):
        pixels[mask] = 100 + number
    moved = transform_ground_truth(truth_of(masks), (30, 40), transform)
    picture = np.asarray(transform_image(Image.fromarray(pixels), transform))[..., 0]
    assert picture.shape == transform.size_hw
    for index in range(len(moved)):
        number = int(moved.annotation_ids[index])
        mask = decode_run_lengths(moved.run_lengths[index], transform.size_hw)
        assert (mask == (picture == 100 + number)).all()
        y, x = np.nonzero(mask)
        box = moved.boxes_xyxy[index]
        assert box[0] <= x.min()
        assert box[1] <= y.min()
        assert box[2] >= x.max() + 1
        assert box[3] >= y.max() + 1
        assert moved.areas[index] == mask.sum()
    kept = {int(i) for i in moved.annotation_ids}
    assert kept == {n for n in range(3) if (picture == 100 + n).any()}


@pytest.mark.parametrize("policy", ["deformable-detr", "large-scale-jitter"])
@pytest.mark.parametrize("fixed", [True, False])
def test_windows_are_seeded_and_useful(policy: Any, fixed: bool) -> None:
    size = (427, 640)

    def sample(number: int, view: str = "a", seed: int = 0) -> ViewTransform:
        return sample_transform(policy, seed, view, number, size, fixed=fixed)

    found = [sample(i) for i in range(200)]
    assert found == [sample(i) for i in range(200)]
    assert found != [sample(i, view="b") for i in range(200)]
    assert found != [sample(i, seed=1) for i in range(200)]
    assert 60 < sum(t.flip for t in found) < 140
    leaves = 0
    for t in found:
        x0, y0, x1, y1 = t.crop_xyxy
        assert x1 > x0 >= 0
        assert y1 > y0 >= 0
        leaves += x1 > size[1] or y1 > size[0]
    assert (leaves > 0) == fixed
    if fixed:
        # Few draws are alike: a view that shows what another shows is a wasted pass.
        assert {t.shortest_edge for t in found} == {0}
        assert len({(t.crop_xyxy, t.flip) for t in found}) > 110
    elif policy == "deformable-detr":
        assert {t.shortest_edge for t in found} == set(range(480, 801, 32))
        assert 60 < sum(t.crop_xyxy == (0, 0, 640, 427) for t in found) < 140


def test_scales_of_a_fixed_input_are_those_of_a_free_one() -> None:
    # Deformable DETR trains at short sides of 480 to 800 and tests at 800.
    for number in range(50):
        free, fixed = (
            sample_transform("deformable-detr", 0, "a", number, (427, 640), fixed=f)
            for f in (False, True)
        )
        assert fixed.flip == free.flip
        assert fixed.crop_xyxy[:2] == free.crop_xyxy[:2]
        for mine, plain in zip(fixed.size_hw, free.size_hw, strict=True):
            assert mine == round(plain * 800 / free.shortest_edge)


def test_base_is_the_image_itself() -> None:
    truth = truth_of([np.ones((4, 6), dtype=bool)])
    transform = identity_transform((4, 6))
    assert transform_ground_truth(truth, (4, 6), transform) is truth
    image = Image.new("RGB", (6, 4), (1, 2, 3))
    assert transform_image(image, transform) is image
