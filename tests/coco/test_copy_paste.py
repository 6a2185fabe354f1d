import numpy as np
import pytest

from mfdetr_cache.coco.copy_paste import Scene, can_be_pasted, copy_paste


def scene_of(colour: int, size_hw: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Scene:
    """A plain picture with rectangles, each in a colour of its own."""
    pixels = np.full((*size_hw, 3), colour, np.uint8)
    masks = np.zeros((len(boxes), *size_hw), np.bool_)
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        pixels[y0:y1, x0:x1] = colour + 1 + index
        masks[index, y0:y1, x0:x1] = True
    numbers = np.arange(len(boxes)) + colour
    return Scene(pixels, masks, numbers, np.zeros(len(boxes), np.bool_))


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_where_their_colours_are(seed: int) -> None:
    """Rectangles do not overlap in either scene, so every pixel says whose it is."""
    scene = scene_of(10, (120, 160), (5, 5, 60, 50), (80, 60, 150, 110), (0, 100, 20, 120))
    donor = scene_of(100, (90, 70), (5, 5, 40, 45), (10, 50, 60, 85))
    found = copy_paste(scene, [donor], np.random.default_rng(seed))
    assert found.size_hw == (120, 160)
    assert found.masks.shape == (len(found), 120, 160)
    assert (found.masks.sum(axis=0) <= 1).all()
    pasted = found.category_ids >= 100
    assert pasted.any()
    for mask, category in zip(found.masks, found.category_ids, strict=True):
        assert mask.sum() >= 64
        if category < 100:
            # Nothing of the scene was resized: colours are exact, and no pixel is left out.
            np.testing.assert_array_equal(mask, (found.pixels == category + 1).all(axis=-1))
        else:
            # A resized outline: inside it the object's colour, mixed with its background's at most.
            colours = found.pixels[mask]
            assert (np.abs(colours.astype(int) - (category + 1)) <= 3).all()
    background = ~found.masks.any(axis=0)
    assert np.isin(found.pixels[background], [10, 11, 12, 13]).all()


def test_what_is_covered_is_gone() -> None:
    scene = scene_of(10, (60, 60), (20, 20, 40, 40))
    donor = scene_of(100, (60, 60), (0, 0, 60, 60))
    for seed in range(200):
        found = copy_paste(scene, [donor], np.random.default_rng(seed))
        left = found.masks[found.category_ids == 10]
        covered = found.masks[found.category_ids == 100].any(axis=0)
        hidden = covered[20:40, 20:40].mean()
        # A tenth of 400 pixels is less than 64.
        assert len(left) == (400 * (1 - hidden) >= 64)
        if len(left):
            assert not (left[0] & covered).any()


def test_chance_alone_decides() -> None:
    scene = scene_of(10, (80, 80), (5, 5, 60, 50))
    donor = scene_of(100, (80, 80), (5, 5, 40, 45))
    first, again, other = (
        copy_paste(scene, [donor, donor], np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.pixels, again.pixels)
    np.testing.assert_array_equal(first.masks, again.masks)
    assert (first.pixels != other.pixels).any()
    # The scenes themselves stay as they are.
    assert scene.masks.sum() == 55 * 45
    assert (scene.pixels[5:50, 5:60] == 11).all()


def test_crowds_and_tiny_objects_stay_where_they_are() -> None:
    scene = scene_of(10, (80, 80), (0, 0, 19, 20), (20, 0, 40, 20), (40, 0, 70, 30))
    np.testing.assert_array_equal(scene.num_pixels, [380, 400, 900])
    crowd = np.array([False, False, True])
    np.testing.assert_array_equal(can_be_pasted(scene.num_pixels, crowd), [False, True, False])
    donor = Scene(scene.pixels, scene.masks, scene.category_ids, crowd)
    for seed in range(20):
        found = copy_paste(scene_of(100, (80, 80)), [donor], np.random.default_rng(seed))
        assert found.category_ids.tolist() == [11]
