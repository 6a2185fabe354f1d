"""Whether the images of a dataset are where they should be."""

from pathlib import Path

from mfdetr_cache.coco.annotations import CocoSplit
from mfdetr_cache.errors import DatasetError, ImageError


def require_images(images: Path, split: CocoSplit, advice: str) -> None:
    """Refuse at once what would otherwise be noticed after hours.

    DatasetError if there is no such folder, ImageError if an image is missing.
    """
    if not images.is_dir():
        raise DatasetError(f"image folder {images} does not exist; {advice}")
    missing = [e for e in split.images if not (images / e.file_name).is_file()]
    if missing:
        raise ImageError(
            f"{len(missing)} of {len(split.images)} images are not in {images}, the first is "
            f"{missing[0].file_name}; {advice}"
        )
