"""Image files of a dataset: found under the name an annotation file gives them, opened safely."""

import contextlib
import os
import re
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError

from mfdetr_cache.errors import DatasetError, ImageError

# Decoders that read pixels and run nothing; Pillow alone would hand PostScript to Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
# So their files end, the most frequent first.
_ENDINGS = (".jpg", ".png", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Files in a folder that are images; the last are none that can be read, which is better told.
IMAGE_SUFFIXES = {*_ENDINGS, ".jfif", ".gif", ".ppm", ".heic", ".heif", ".avif", ".jp2"}
# Pillow's own limit of an error. An image of this size takes half a gigabyte as RGB.
MOST_PIXELS = 178_956_970
# Half of it is worth a warning to Pillow, which would come in the middle of our own lines.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# Nor is a tag of the file that Pillow passes over.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
_ORIENTATION = 0x0112
# Bytes, on Linux together with the folder's.
_LONGEST_PATH = 3000


def check_file_name(name: str, where: str) -> None:
    """Refuse a file name that leads out of the image folder, on any operating system.

    DatasetError if it is absolute, has ``..`` in it, or is no name of a file.
    """
    fault = fault_of_name(name)
    if fault:
        shown = repr(name if len(name) <= 300 else f"{name[:300]}...")
        raise DatasetError(f"{where} has the file_name {shown}, {fault}")


def fault_of_name(name: str) -> str:
    """What is wrong with a file name; empty if nothing is."""
    plain = PurePosixPath(name.replace("\\", "/"))
    if plain.is_absolute() or re.match("[A-Za-z]:[/\\\\]", name):
        return "which is absolute; write it relative to the image folder"
    if ".." in plain.parts:
        return "which leaves the image folder; write it relative to the image folder, without '..'"
    if not plain.parts or "\0" in name or any("\ud800" <= c <= "\udfff" for c in name):
        return "which is no name of a file"
    if len(name.encode()) > _LONGEST_PATH or max(len(p.encode()) for p in plain.parts) > 255:
        return "which is too long for a file"
    return ""


def find_file(folder: Path, name: str) -> str | None:
    """The name under which a file is in a folder; None if it is not there.

    In annotation files names have the separators of Windows, %20 for a space, the ending in other
    capitals, or letters composed in another way than on disk.
    """
    # Unlike pathlib's, this one takes names that are too long for any file.
    return next((n for n in _spellings(name) if os.path.isfile(folder / n)), None)  # noqa: PTH113


def _spellings(name: str) -> Iterator[str]:
    """A name and what tools make of it."""
    for decoded in dict.fromkeys((name, unquote(name), name.strip())):
        if fault_of_name(decoded):
            continue  # %2e%2e leads out of the folder, too
        for separated in dict.fromkeys((decoded, decoded.replace("\\", "/"))):
            stem, dot, ending = separated.rpartition(".")
            for capital in dict.fromkeys((ending, ending.lower(), ending.upper())):
                spelled = f"{stem}{dot}{capital}"
                yield spelled
                for form in ("NFC", "NFD"):
                    yield unicodedata.normalize(form, spelled)


def files_by_stem(folder: Path) -> dict[str, list[str]]:
    """The image files of a folder by their names in small letters without their ending."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):  # it is not there
        for name in sorted(os.listdir(folder)):  # noqa: PTH208
            if PurePosixPath(name).suffix.lower() in _ENDINGS:
                found.setdefault(plain_stem(PurePosixPath(name)), []).append(name)
    return found


def plain_stem(path: PurePosixPath) -> str:
    """The name of an image in small letters without its ending.

    What stands behind a dot may belong to the name, as in ``frame_0.25``.
    """
    return (path.stem if path.suffix.lower() in _ENDINGS else path.name).lower()


def open_image(path: Path) -> Image.Image:
    """Open an image file without decoding its pixels.

    ImageError if it is no regular file, no image of a known format, or too large.
    """
    if not path.is_file():
        lacking = "is no regular file" if path.exists() else "is not on disk"
        raise ImageError(f"image {path} {lacking}; check --images")
    try:
        opened = Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {path} {_too_large(str(error))}") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"image {path} cannot be decoded: it is none of {', '.join(_FORMATS)}{_instead(path)}"
        ) from error
    except (OSError, ValueError, SyntaxError, OverflowError, MemoryError) as error:
        raise ImageError(f"image {path} cannot be decoded: {error}") from error
    if opened.width * opened.height > MOST_PIXELS:
        opened.close()
        raise ImageError(f"image {path} {_too_large(f'{opened.width * opened.height} pixels')}")
    return opened


def _instead(path: Path) -> str:
    """What a file is that is none of the formats, behind a message; nothing if that is unknown."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "; it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "; it is a pointer of Git LFS: run git lfs pull"
    if head.lstrip().startswith(b"<"):
        return "; it begins as HTML or SVG does"
    if head[4:8] in (b"ftyp", b"jP  "):
        kind = (
            "JPEG 2000" if head[4:8] == b"jP  " else head[8:12].decode("ascii", "replace").upper()
        )
        return f"; it is {kind}: save it as PNG or JPEG"
    return ""


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image: 1 to 8.

    1, upright, where there is none or it cannot be read.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, OverflowError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file after EXIF rotation; ImageError if it is no image."""
    with open_image(path) as image:
        size = (image.height, image.width)
        return size[::-1] if orientation(image) >= 5 else size


def _too_large(said: str) -> str:
    return (
        f"has too many pixels ({said.split(',')[0]}; the limit of mfdetr is {MOST_PIXELS}): cut it "
        "into tiles, or save it smaller"
    )
