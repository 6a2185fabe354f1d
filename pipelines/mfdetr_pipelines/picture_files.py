"""Image and video files that predict reads, and those that it writes."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mfdetr_cache.coco.image_files import IMAGE_SUFFIXES, open_image
from mfdetr_cache.errors import DatasetError, ImageError, OutputError
from mfdetr_cache.files import PARTIAL, whole_file
from mfdetr_pipelines.predict_video import WRITTEN_BY, was_written_by_predict

_VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}

_LONGEST_STEM = 220


def is_video(file: Path) -> bool:
    """Whether a file is a video by its name."""
    return file.suffix.lower() in _VIDEO_SUFFIXES


def find_images(patterns: Sequence[str], out: Path) -> list[Path]:
    """Image and video files of files, folders, glob patterns and file:// URLs, without duplicates.

    Folders are sorted; what this command wrote to ``out`` before is not an input. DatasetError if
    one of the patterns matches nothing else.
    """
    ours = out.resolve()
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern.removeprefix("file://"))
        if path.is_dir():
            if not os.access(path, os.R_OK | os.X_OK):
                raise DatasetError(f"{pattern} may not be read by this user")
            files = sorted(
                f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES | _VIDEO_SUFFIXES
            )
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(pattern, recursive=True))  # noqa: PTH207
        files = [f for f in files if f == path or ours not in f.resolve().parents or not is_ours(f)]
        if not files:
            raise DatasetError(f"{pattern}: no image there; give files, folders or patterns")
        found.update(dict.fromkeys(files))
    return list(found)


def picture_paths(files: Sequence[Path], out: Path) -> list[Path]:
    """The output file of every image, all different: ``.png``, or ``.mp4`` for a video.

    Existing files are replaced only if this command wrote them.
    """
    inputs = {file.resolve() for file in files}
    # Some file systems take names that differ in case for the same.
    taken: set[str] = set()
    paths = []
    for file in files:
        ending = ".mp4" if is_video(file) else ".png"
        # Room for ending, number and .partial within the 255 bytes of a name.
        stem = os.fsdecode(os.fsencode(file.stem)[:_LONGEST_STEM])
        path, number = out / f"{stem}{ending}", 2
        while path.name.casefold() in taken or path.resolve() in inputs or not is_ours(path):
            path, number = out / f"{stem}-{number}{ending}", number + 1
        taken.add(path.name.casefold())
        paths.append(path)
    return paths


def require_ours(folder: Path) -> None:
    """Refuse a folder that is a link, holds one, or what :func:`save_picture` did not write."""
    there = folder.exists() or folder.is_symlink()
    for file in (folder, *sorted(folder.rglob("*"))) if there else ():
        if file.is_dir():
            written = not file.is_symlink()
        else:
            written = file.suffix == PARTIAL or (file.suffix == ".png" and is_ours(file))
        if not written:
            raise OutputError(
                f"{file} was not written by this command; nothing was touched, choose another --out"
            )


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG that says who wrote it, so that a later run may replace it; OutputError."""
    mark = PngInfo()
    mark.add_text("Software", WRITTEN_BY)
    with whole_file(path) as partial:
        image.save(partial, "PNG", pnginfo=mark)


def holds_pictures_of_ours(folder: Path) -> bool:
    """Whether a folder holds a picture or video that this command wrote."""
    return any(f.suffix in (".png", ".mp4") and is_ours(f) for f in folder.iterdir())


def is_ours(path: Path) -> bool:
    """Whether a file is absent or was written by this command."""
    if not path.exists() and not path.is_symlink():
        return True
    if not path.is_file():
        return False
    if path.suffix == ".mp4":
        return was_written_by_predict(path)
    try:
        with open_image(path) as picture:
            return picture.info.get("Software") == WRITTEN_BY
    except ImageError:
        return False
