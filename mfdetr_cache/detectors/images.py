"""Reading of image files in the orientation of their annotations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mfdetr_cache.coco.image_files import open_image, orientation
from mfdetr_cache.errors import ImageError

_LARGEST_16_BITS, _LARGEST_14_BITS = (1 << 16) - 1, (1 << 14) - 1

# What is odd about a file that can be read, for warnings with a count.
EXIF_UNTOLD = (
    "images whose size cannot tell whether they were annotated before or after EXIF rotation; they "
    "are rotated, as viewers and predict do. Remove the tag where the annotations were made without"
)
DARK_16_BITS = (
    "images of 16 bits that use the lowest 14 or less: of 16 bits the upper eight are kept, so "
    "they are dark or black. Save them as 8 bits, or scale them to the whole range"
)


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """A decoded image file.

    Attributes:
        image: RGB at its original size.
        oddities: Properties of the file to warn of, each one of the texts above.
        untold: The EXIF orientation of a file that was rotated although it cannot be known whether
            its annotations were made before; else 1.
    """

    image: Image.Image
    oddities: tuple[str, ...]
    untold: int = 1


def load_image(path: Path, annotated_hw: tuple[int, int] | None = None) -> Image.Image:
    """An image file as RGB at its original size; see :func:`load_with_oddities`."""
    return load_with_oddities(path, annotated_hw).image


def load_with_oddities(path: Path, annotated_hw: tuple[int, int] | None = None) -> LoadedImage:
    """An image file as RGB at its original size, with what the user should be warned of.

    Grayscale, palette and CMYK files become RGB; of 16 bits the upper eight are kept, as OpenCV
    does, where Pillow alone would make everything above 255 white. COCO's annotations ignore EXIF
    rotation; other tools apply it. The annotated size decides between them; where both sizes are
    the same or ``annotated_hw`` is None, rotation is applied.

    ImageError if the file is missing, cannot be decoded to its end, or has another size than
    annotated.
    """
    try:
        with open_image(path) as opened:
            stored = str(getattr(opened, "tile", ""))
            opened.load()
            size = (opened.height, opened.width)
            turned = orientation(opened)
            upright = size[::-1] if turned >= 5 else size
            untold = turned if annotated_hw and upright == size else 1
            oddities = (EXIF_UNTOLD,) if untold > 1 else ()
            if annotated_hw is not None and annotated_hw not in (size, upright):
                advice = "are these the right --images and --annotations?"
                if annotated_hw == size[::-1]:
                    advice = "its height and width are swapped there"
                raise ImageError(
                    f"image {path} is {size[0]} x {size[1]} (height x width), its annotation says "
                    f"{annotated_hw[0]} x {annotated_hw[1]}; {advice}"
                )
            wide = ";16" in stored or opened.mode.startswith("I")
            if wide and _largest(opened) <= _LARGEST_14_BITS:
                oddities = (*oddities, DARK_16_BITS)
            if turned > 1 and annotated_hw in (None, upright):
                return LoadedImage(as_rgb(ImageOps.exif_transpose(opened)), oddities, untold)
            return LoadedImage(as_rgb(opened), oddities)
    except (OSError, ValueError, SyntaxError, OverflowError, MemoryError, TypeError) as error:
        raise ImageError(f"image {path} cannot be decoded: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB; of 16 bits the upper eight are kept.

    ValueError for floating point or wider integers, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > _LARGEST_16_BITS:
            raise ValueError("its pixels have more than 16 bits; convert it to 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


def _largest(image: Image.Image) -> int:
    """The largest value of an image of 16 bits, of which Pillow keeps the upper eight in colour."""
    extrema: tuple[Any, ...] = image.getextrema()
    if image.mode.startswith("I"):
        return int(extrema[1])
    return max(int(high) for _, high in extrema[:3]) << 8
