"""Image files, opened so that pixels and annotations speak of the same picture."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mfdetr_cache.errors import ImageError

_LARGEST_16_BITS = (1 << 16) - 1


def load_image(path: Path, annotated_hw: tuple[int, int] | None = None) -> Image.Image:
    """An image file as RGB at its original size.

    Grayscale, palette and CMYK files become RGB; of 16 bits the upper eight are kept, as OpenCV
    does, where Pillow alone would make everything above 255 white. COCO's annotations ignore EXIF
    rotation; other tools apply it. The annotated size tells which one is meant here.

    Args:
        path: The image file.
        annotated_hw: Height and width in the annotation file; None applies EXIF rotation.

    Returns:
        The decoded image.

    Raises:
        ImageError: If the file is missing, cannot be decoded to its end, or has another size than
            annotated.
    """
    if not path.is_file():
        raise ImageError(f"image {path} is not on disk; check --images")
    try:
        with Image.open(path) as opened:
            opened.load()
            if annotated_hw is None:
                return as_rgb(ImageOps.exif_transpose(opened))
            if (opened.height, opened.width) == annotated_hw:
                return as_rgb(opened)
            rotated = ImageOps.exif_transpose(opened)
            if (rotated.height, rotated.width) == annotated_hw:
                return as_rgb(rotated)
            size = (opened.height, opened.width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {path} cannot be decoded: {error}") from error
    raise ImageError(
        f"image {path} is {size[0]} x {size[1]} (height x width), its annotation says "
        f"{annotated_hw[0]} x {annotated_hw[1]}; are these the right --images and --annotations?"
    )


def as_rgb(image: Image.Image) -> Image.Image:
    """A decoded image as RGB of eight bits.

    Args:
        image: Of any mode; of 16 bits the upper eight are kept.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: If its pixels are floating point or wider numbers, whose range nobody knows.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > _LARGEST_16_BITS:
            raise ValueError("its pixels have more than 16 bits; convert it to 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")
