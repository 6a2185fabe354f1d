"""Image files, opened so that pixels and annotations speak of the same picture."""

from pathlib import Path

from PIL import Image, ImageOps

from mfdetr_cache.errors import ImageError


def load_image(path: Path, annotated_hw: tuple[int, int] | None = None) -> Image.Image:
    """An image file as RGB at its original size.

    Grayscale, palette and CMYK files become RGB. COCO's annotations ignore EXIF rotation; other
    tools apply it. The annotated size tells which one is meant here.

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
                return ImageOps.exif_transpose(opened).convert("RGB")
            if (opened.height, opened.width) == annotated_hw:
                return opened.convert("RGB")
            rotated = ImageOps.exif_transpose(opened)
            if (rotated.height, rotated.width) == annotated_hw:
                return rotated.convert("RGB")
            size = (opened.height, opened.width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {path} cannot be decoded: {error}") from error
    raise ImageError(
        f"image {path} is {size[0]} x {size[1]} (height x width), its annotation says "
        f"{annotated_hw[0]} x {annotated_hw[1]}; are these the right --images and --annotations?"
    )
