import numpy as np
from PIL import Image

from mfdetr_cache.evaluation.overlay import PALETTE, OverlayItem, draw_overlay, side_by_side
from tests.support.rectangles import runs_of

MASK = np.zeros((60, 80), dtype=bool)
MASK[20:40, 10:50] = True


def item(text: str = "cat 0.9") -> OverlayItem:
    return OverlayItem(text, (10.0, 20.0, 50.0, 40.0), runs_of(MASK))


def test_masks_are_coloured_inside_and_nothing_else_changes() -> None:
    image = Image.new("RGB", (80, 60), (100, 100, 100))
    drawn = np.asarray(draw_overlay(image, [OverlayItem("", None, runs_of(MASK))]))
    outside = drawn[~MASK]
    assert (outside == 100).all()
    assert (drawn[20, 10:50] == PALETTE[0]).all()
    inside = 0.55 * 100 + 0.45 * np.array(PALETTE[0])
    assert np.abs(drawn[30, 30] - inside).max() <= 1


def test_enlarged_pictures_show_the_same_at_a_larger_size() -> None:
    image = Image.new("RGB", (80, 60), (100, 100, 100))
    drawn = draw_overlay(image, [OverlayItem("", None, runs_of(MASK))], least_side=250)
    assert drawn.size == (240, 180)
    pixels = np.asarray(drawn)
    assert (pixels[58, 100] == 100).all()
    assert (pixels[62, 100] != 100).any()


def test_labels_stay_in_the_picture_and_empty_masks_are_no_problem() -> None:
    image = Image.new("RGB", (80, 60))
    nothing = np.zeros((60, 80), dtype=bool)
    corner = OverlayItem("a long label", (70.0, -5.0, 90.0, 20.0), runs_of(nothing))
    assert draw_overlay(image, [corner, item()]).size == (80, 60)


def test_panels_stand_beside_each_other() -> None:
    panel = Image.new("RGB", (80, 60))
    sheet = side_by_side([("one", panel), ("two", panel)], height=120)
    assert sheet.width > 2 * 160
    assert sheet.height > 120


def test_a_colour_can_be_chosen() -> None:
    image = Image.new("RGB", (40, 40))
    mask = np.ones((40, 40), dtype=np.bool_)
    plain = draw_overlay(image, [OverlayItem("", None, runs_of(mask))])
    fourth = draw_overlay(image, [OverlayItem("", None, runs_of(mask), len(PALETTE) + 3)])
    assert plain.getpixel((0, 0)) == PALETTE[0]
    assert fourth.getpixel((0, 0)) == PALETTE[3]
