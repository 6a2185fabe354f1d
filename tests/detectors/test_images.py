"""Image files come out upright, as 8-bit RGB, whatever a camera wrote."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mfdetr_cache.detectors.images import DARK_16_BITS, EXIF_UNTOLD, load_with_oddities
from mfdetr_cache.errors import ImageError

TURN = Image.Transpose
# What a camera held so has to have stored, to be upright once a viewer has turned it (EXIF 2.3).
STORED = {
    2: TURN.FLIP_LEFT_RIGHT,
    3: TURN.ROTATE_180,
    4: TURN.FLIP_TOP_BOTTOM,
    5: TURN.TRANSPOSE,
    6: TURN.ROTATE_90,
    7: TURN.TRANSVERSE,
    8: TURN.ROTATE_270,
}


def scene(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", [(20, 30), (24, 24)])
@pytest.mark.parametrize("tag", STORED)
def test_every_orientation_is_upright_as_its_annotation(
    tmp_path: Path, tag: int, size: tuple[int, int]
) -> None:
    upright, path = scene(*size), tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = upright.transpose(STORED[tag])
    stored.save(path, exif=exif)
    for annotated in (None, size):
        loaded = load_with_oddities(path, annotated)
        np.testing.assert_array_equal(np.asarray(loaded.image), np.asarray(upright))
        # Where both sizes are the same nobody can know which way was annotated.
        is_told = annotated is not None and (stored.size == upright.size)
        assert loaded.oddities == ((EXIF_UNTOLD,) if is_told else ())
        assert loaded.untold == (tag if is_told else 1)
    if stored.size != upright.size:
        as_stored = load_with_oddities(path, size[::-1]).image
        np.testing.assert_array_equal(np.asarray(as_stored), np.asarray(stored))


def test_swapped_sides_are_called_that(tmp_path: Path) -> None:
    scene(20, 30).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="is 20 x 30 .* its height and width are swapped there"):
        load_with_oddities(tmp_path / "a.png", (30, 20))
    with pytest.raises(ImageError, match="are these the right --images"):
        load_with_oddities(tmp_path / "a.png", (20, 31))


def test_sixteen_bits_keep_the_upper_eight(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (20, 30)).astype(np.uint16)
    for largest, oddities in ((2**16 - 1, ()), (2**14 - 1, (DARK_16_BITS,))):
        for kind in (np.uint16, np.int32):
            Image.fromarray((values & largest).astype(kind)).save(tmp_path / "a.tif")
            loaded = load_with_oddities(tmp_path / "a.tif", (20, 30))
            grey = np.asarray(loaded.image)[..., 0]
            np.testing.assert_array_equal(grey, (values & largest) >> 8)
            assert loaded.oddities == oddities


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run git lfs pull"),
        (b"<!DOCTYPE html><html>", "begins as HTML"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "it is HEIC: save it as PNG or JPEG"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "it is JPEG 2000: save it as PNG"),
        (b"nothing known", "PPM$"),
    ],
)
def test_what_is_no_image_is_called_by_its_name(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ImageError, match=rf"a\.jpg cannot be decoded: it is none of JPEG.*{said}"):
        load_with_oddities(tmp_path / "a.jpg", None)
