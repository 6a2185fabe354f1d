from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from mfdetr_cache.ops.masks import (
    compress_run_lengths,
    decode_run_lengths,
    encode_mask,
    rasterise_in_boxes,
    run_lengths_of_segmentation,
)
from mfdetr_cache.ops.masks_pasting import paste_probabilities_in_image, run_lengths_in_box

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def random_mask(size_hw: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(size_hw) > 0.5


@given(sizes, st.integers(0, 1000))
def test_run_lengths_round_trip(size_hw: tuple[int, int], seed: int) -> None:
    mask = random_mask(size_hw, seed)
    runs = run_lengths_of_segmentation(encode_mask(mask), size_hw)
    assert (decode_run_lengths(runs, size_hw) == mask).all()
    assert (coco_mask.decode(compress_run_lengths(runs, size_hw)).astype(bool) == mask).all()


def test_polygons_are_drawn_as_pycocotools_draws_them() -> None:
    polygons = [[2.5, 1.0, 30.2, 4.0, 25.0, 28.7, 3.0, 20.0], [31, 31, 39, 31, 35, 39]]
    wanted = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 40, 41)))
    runs = run_lengths_of_segmentation(polygons, (40, 41))
    assert (decode_run_lengths(runs, (40, 41)) == wanted.astype(bool)).all()


def test_outlines_are_bounded_by_their_length_and_not_by_their_points() -> None:
    """pycocotools keeps ten numbers for every pixel of an outline."""
    along = [float(v) for x in range(20_000) for v in (x / 2, 3 + x % 2)]
    runs = run_lengths_of_segmentation([along], (8, 10_000))
    assert runs[1::2].sum() > 0
    across = [0.0, 0.0, 10_000.0, 6.0] * 600
    with pytest.raises(ValueError, match="outline of a polygon is longer than"):
        run_lengths_of_segmentation([across], (8, 10_000))


def test_long_runs_survive_compression() -> None:
    mask = np.zeros((700, 900), dtype=bool)
    mask[10:650, 100:700] = True
    mask[300:310] = False
    runs = run_lengths_of_segmentation(encode_mask(mask), mask.shape)
    assert (decode_run_lengths(runs, mask.shape) == mask).all()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1.0, 1.0, 2.0, 2.0]], "at least three points"),
        ({"size": [5, 5], "counts": [25]}, "in an image of"),
        ({"size": [4, 6], "counts": [23]}, "do not sum"),
    ],
)
def test_malformed_segmentations_are_refused(segmentation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_lengths_of_segmentation(segmentation, (4, 6))  # type: ignore[arg-type]


@given(
    size=sizes,
    corners=st.tuples(*[st.floats(-10, 50)] * 4),
    seed=st.integers(0, 2**16),
    grid=st.integers(1, 9),
    subsamples=st.integers(1, 3),
)
def test_rasterising_is_the_mean_of_points_looked_up_one_by_one(
    size: tuple[int, int], corners: tuple[float, ...], seed: int, grid: int, subsamples: int
) -> None:
    """Speckled masks; boxes inside, across and outside the border, some thinner than a pixel."""
    mask = random_mask(size, seed)
    runs = run_lengths_of_segmentation(encode_mask(mask), size)
    x0, x1 = sorted(corners[:2])
    y0, y1 = sorted(corners[2:])
    steps = (np.arange(grid * subsamples) + 0.5) / (grid * subsamples)
    x, y = np.meshgrid(x0 + steps * (x1 - x0), y0 + steps * (y1 - y0))
    row, column = np.floor(y).astype(int), np.floor(x).astype(int)
    inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
    points = inside & mask[np.where(inside, row, 0), np.where(inside, column, 0)]
    cells = points.reshape(grid, subsamples, grid, subsamples).sum(axis=(1, 3))
    box = np.array([[x0, y0, x1, y1]])
    found = rasterise_in_boxes([runs], size, box, grid, subsamples)[0][0]
    assert found.dtype == np.float32
    assert (found == cells.astype(np.float32) / np.float32(subsamples**2)).all()


def test_rasterising_pixel_aligned_boxes_gives_their_pixels_and_counts_the_others() -> None:
    masks = [random_mask((20, 30), seed) for seed in (3, 4)]
    runs = [run_lengths_of_segmentation(encode_mask(m), m.shape) for m in masks]
    boxes = np.array([[4.0, 2.0, 12.0, 10.0], [20.0, 12.0, 28.0, 20.0]])
    cells, outside = rasterise_in_boxes(runs, (20, 30), boxes, 8)
    inside = [masks[0][2:10, 4:12], masks[1][12:20, 20:28]]
    assert (cells == np.stack(inside)).all()
    left = [(m.sum() - i.sum()) / 64 for m, i in zip(masks, inside, strict=True)]
    np.testing.assert_allclose(outside, left, rtol=1e-6)
    assert min(left) > 1
    none, nothing = rasterise_in_boxes([], (20, 30), np.zeros((0, 4)), 8)
    assert none.shape == (0, 8, 8)
    assert nothing.shape == (0,)


def test_rasterising_the_whole_image_cell_by_pixel_gives_the_mask() -> None:
    mask = random_mask((12, 20), 5)
    runs = run_lengths_of_segmentation(encode_mask(mask), mask.shape)
    box = np.array([[0.0, 0.0, 20.0, 12.0]])
    assert (rasterise_in_boxes([runs], mask.shape, box, (12, 20))[0][0] == mask).all()
    halves = rasterise_in_boxes([runs], mask.shape, box, (6, 10))[0][0]
    assert (halves == mask.reshape(6, 2, 10, 2).mean(axis=(1, 3))).all()


def test_rasterising_beyond_the_border_is_background() -> None:
    mask = np.ones((10, 10), dtype=bool)
    runs = run_lengths_of_segmentation(encode_mask(mask), mask.shape)
    box = np.array([[-5.0, 0.0, 5.0, 10.0]])
    cells = rasterise_in_boxes([runs], mask.shape, box, 4)[0][0]
    assert (cells[:, :2] == 0).all()
    assert (cells[:, 2:] == 1).all()


def pasted_mask(probs: NDArray[np.float32], box: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    return decode_run_lengths(run_lengths_in_box(probs, np.array(box), size), size)


def test_pasting_a_full_mask_fills_the_pixels_of_its_box() -> None:
    pasted = pasted_mask(np.ones((8, 8), np.float32), (2.2, 3.0, 7.6, 9.4), (12, 12))
    wanted = np.zeros((12, 12), dtype=bool)
    # Centres at 2.5 ... 7.5 and at 3.5 ... 8.5 (9.5 is outside 9.4).
    wanted[3:9, 2:8] = True
    assert (pasted == wanted).all()


@given(st.integers(0, 500))
def test_pasting_equals_bilinear_interpolation_pixel_by_pixel(seed: int) -> None:
    random = np.random.default_rng(seed)
    probs = random.random((6, 6)).astype(np.float32)
    x0, y0 = random.uniform(-6, 15, 2)
    box = np.array([x0, y0, x0 + random.uniform(0.5, 20), y0 + random.uniform(0.5, 20)])
    pasted = pasted_mask(probs, box, (18, 22))
    for row in range(18):
        for column in range(22):
            x, y = column + 0.5, row + 0.5
            inside = box[0] <= x <= box[2] and box[1] <= y <= box[3]
            if not inside:
                assert not pasted[row, column]
                continue
            u = np.clip((x - box[0]) / (box[2] - box[0]) * 6 - 0.5, 0, 5)
            v = np.clip((y - box[1]) / (box[3] - box[1]) * 6 - 0.5, 0, 5)
            i, j = int(v), int(u)
            k, m = min(i + 1, 5), min(j + 1, 5)
            value = (probs[i, j] * (1 - (u - j)) + probs[i, m] * (u - j)) * (1 - (v - i))
            value += (probs[k, j] * (1 - (u - j)) + probs[k, m] * (u - j)) * (v - i)
            # Values a rounding error away from the threshold may fall on either side.
            if abs(value - 0.5) > 1e-5:
                assert pasted[row, column] == (value >= 0.5)


@pytest.mark.parametrize(
    "box", [(50.0, 50.0, 60.0, 60.0), (3.0, 3.0, 3.0, 9.0), (-9.0, -9.0, -1.0, -1.0)]
)
def test_boxes_without_a_pixel_give_an_empty_mask(box: tuple[float, ...]) -> None:
    assert not pasted_mask(np.ones((4, 4), np.float32), box, (20, 20)).any()


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    corners=st.tuples(*[st.floats(-10, 50)] * 4),
    seed=st.integers(0, 2**16),
    share=st.floats(0.05, 2),
)
def test_run_lengths_in_a_box_are_those_of_the_pasted_bitmap(
    size: tuple[int, int], corners: tuple[float, ...], seed: int, share: float
) -> None:
    """Boxes inside, across and outside the border; full, empty and speckled masks."""
    x0, x1 = sorted(corners[:2])
    y0, y1 = sorted(corners[2:])
    box = np.array([x0, y0, x1, y1])
    probs = (np.random.default_rng(seed).random((8, 8)) ** share).astype(np.float32)
    wanted = encode_mask(paste_probabilities_in_image(probs, box, size) >= 128)
    assert compress_run_lengths(run_lengths_in_box(probs, box, size), size) == wanted
