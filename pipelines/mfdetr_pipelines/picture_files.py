"""Image and video files that a user names one by one, as folders or as patterns."""

import glob
from collections.abc import Sequence
from pathlib import Path

from mfdetr_cache.errors import DatasetError

VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Image and video files of files, folders, glob patterns and file:// URLs, without duplicates.

    Folders are sorted. DatasetError if one of the patterns matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern.removeprefix("file://"))
        if path.is_dir():
            files = sorted(
                f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES | VIDEO_SUFFIXES
            )
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(pattern, recursive=True))  # noqa: PTH207
        if not files:
            raise DatasetError(f"{pattern}: no image there; give files, folders or patterns")
        found.update(dict.fromkeys(files))
    return list(found)
