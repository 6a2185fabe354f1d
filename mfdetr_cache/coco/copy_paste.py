"""Copy-paste: objects of one annotated picture on another (Ghiasi et al., 2021).

With some hundred images a mask network has soon seen every object on its background. Pasted objects
stand before new ones, and cover others. The pictures are made before a detector sees them.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Pasted objects are 0.5 to 1.5 times as large as if their picture filled the other one.
_SCALE_RANGE = (0.5, 1.5)
_MOST_DONORS = 2
# Smaller ones come out as a few pixels of nothing.
LEAST_PIXELS_TO_PASTE = 400
# Objects of which less is left to see, in pixels and of what was there, are no longer annotated.
_LEAST_PIXELS, _LEAST_SHARE = 64, 0.1


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and its N objects.

    Attributes:
        pixels: RGB, uint8, shape (H, W, 3).
        masks: Where each object is visible, bool, shape (N, H, W).
        category_ids: COCO category of each, shape (N,).
        is_crowd: bool, shape (N,).
    """

    pixels: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    category_ids: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def num_pixels(self) -> NDArray[np.int64]:
        """Visible pixels of each object, shape (N,)."""
        return np.asarray(self.masks.sum(axis=(1, 2)), np.int64)

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.pixels.shape[0]), int(self.pixels.shape[1])

    def chosen(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> "Scene":
        """The same picture with some of its objects."""
        return Scene(self.pixels, self.masks[which], self.category_ids[which], self.is_crowd[which])

    def mirrored(self) -> "Scene":
        """The scene from left to right."""
        return replace(self, pixels=self.pixels[:, ::-1], masks=self.masks[:, :, ::-1])

    def resized(self, size_hw: tuple[int, int]) -> "Scene":
        """The scene in another size in pixels."""
        size = size_hw[::-1]
        pixels = np.asarray(Image.fromarray(self.pixels).resize(size, Image.Resampling.BILINEAR))
        masks = np.zeros((len(self), *size_hw), np.bool_)
        for resized, mask in zip(masks, self.masks, strict=True):
            drawn = Image.fromarray(mask.astype(np.uint8) * 255)
            resized[:] = np.asarray(drawn.resize(size, Image.Resampling.BILINEAR)) > 127
        return replace(self, pixels=pixels, masks=masks)


def can_be_pasted(num_pixels: NDArray[np.int64], is_crowd: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of N objects can be pasted elsewhere, shape (N,): no crowds, no tiny ones."""
    return (num_pixels >= LEAST_PIXELS_TO_PASTE) & ~is_crowd


def num_donors(random: np.random.Generator) -> int:
    """How many scenes give objects to the next one."""
    return int(random.integers(1, _MOST_DONORS + 1))


def copy_paste(scene: Scene, donors: list[Scene], random: np.random.Generator) -> Scene:
    """A scene, mirrored or not, with objects of others on it; ``random`` alone decides.

    Each donor, which has an object to paste, gives about half of its objects, at least one:
    mirrored or not, at one scale, in their places to each other, anywhere in the picture. What lies
    under a pasted object is no longer part of another's mask; objects with less than a tenth or 64
    pixels left are gone.
    """
    if random.random() < 0.5:
        scene = scene.mirrored()
    for donor in donors:
        scene = _pasted(scene, _prepared(donor, scene.size_hw, random), random)
    return scene


def _prepared(donor: Scene, size_hw: tuple[int, int], random: np.random.Generator) -> Scene:
    """Some objects of a donor, for a picture of a size."""
    candidates = np.flatnonzero(can_be_pasted(donor.num_pixels, donor.is_crowd))
    which = candidates[random.random(len(candidates)) < 0.5]
    if not len(which):
        which = random.choice(candidates, 1)
    low, high = np.log(_SCALE_RANGE)
    fit = min(a / b for a, b in zip(size_hw, donor.size_hw, strict=True))
    scale = fit * float(np.exp(random.uniform(low, high)))
    height, width = (max(1, round(side * scale)) for side in donor.size_hw)
    prepared = donor.chosen(which).resized((height, width))
    return prepared.mirrored() if random.random() < 0.5 else prepared


def _pasted(scene: Scene, donor: Scene, random: np.random.Generator) -> Scene:
    """All objects of a donor on a scene, in a random place."""
    union: NDArray[np.bool_] = np.any(donor.masks, axis=0)
    if not union.any():  # thin ones can vanish in the resize
        return scene
    starts, targets, lengths = [], [], []
    for axis, side in enumerate(scene.size_hw):
        occupied = np.flatnonzero(np.any(union, axis=1 - axis))
        first, length = int(occupied[0]), int(occupied[-1] - occupied[0] + 1)
        # Inside, or covering the picture where it is larger.
        spare = side - length
        place = int(random.integers(min(0, spare), max(0, spare) + 1))
        starts.append(first + max(0, -place))
        targets.append(max(0, place))
        lengths.append(min(side, place + length) - max(0, place))
    (y, x), (row, column), (height, width) = starts, targets, lengths
    source = (slice(y, y + height), slice(x, x + width))
    target = (slice(row, row + height), slice(column, column + width))
    covered = np.zeros(scene.size_hw, np.bool_)
    covered[target] = union[source]
    pixels = scene.pixels.copy()
    pixels[target][union[source]] = donor.pixels[source][union[source]]
    new = np.zeros((len(donor), *scene.size_hw), np.bool_)
    new[:, target[0], target[1]] = donor.masks[:, source[0], source[1]]
    before = np.concatenate((scene.num_pixels, donor.num_pixels))
    whole = Scene(
        pixels,
        np.concatenate((scene.masks & ~covered, new)),
        np.concatenate((scene.category_ids, donor.category_ids)),
        np.concatenate((scene.is_crowd, donor.is_crowd)),
    )
    left = whole.num_pixels
    return whole.chosen((left >= _LEAST_PIXELS) & (left >= _LEAST_SHARE * before))
