import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.detectors.preprocess import Preprocessing, shortest_edge_size
from mfdetr_cache.errors import DetectorError, ImageError

COCO = Preprocessing.from_processor(
    {
        "size": {"shortest_edge": 800, "longest_edge": 1333},
        "do_normalize": True,
        "image_mean": (0.485, 0.456, 0.406),
        "image_std": (0.229, 0.224, 0.225),
    },
    "test",
)


def test_sizes_equal_the_official_table(shared: Path) -> None:
    table = json.loads((shared / "goldens/preprocess/resize_800_1333.json").read_text())
    for entry in table:
        width, height = entry["in_wh"]
        assert shortest_edge_size((height, width), 800, 1333) == tuple(reversed(entry["out_wh"]))


def test_pixels_equal_the_official_ones(shared: Path) -> None:
    spec = importlib.util.spec_from_file_location("synth", shared / "goldens/preprocess/synth.py")
    assert spec is not None
    assert spec.loader is not None
    synth = importlib.util.module_from_spec(spec)
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    spec.loader.exec_module(synth)
    sys.dont_write_bytecode = before
    golden = np.load(shared / "goldens/preprocess/pixels.npz")
    for index, (height, width) in synth.PICTURES.items():
        pixels = COCO(Image.fromarray(synth.synth(height, width, index))).numpy()
        assert tuple(golden[f"img{index}_out_shape"]) == pixels.shape
        # One float32 rounding of values below 3 in each of two operations.
        np.testing.assert_allclose(pixels[:, ::16, ::16], golden[f"img{index}_every16"], atol=1e-6)


def test_fixed_size_ignores_the_aspect() -> None:
    fixed = Preprocessing.from_processor({"size": {"height": 64, "width": 96}}, "test")
    geometry = fixed.input_geometry((10, 500))
    assert geometry.input_hw == geometry.resized_hw == (64, 96)
    values = fixed(Image.new("RGB", (500, 10), (255, 0, 0)))
    assert values.shape == (3, 64, 96)
    assert values[0].min() == 1
    assert values[1].max() == 0


def test_one_mean_is_that_of_all_channels() -> None:
    size = {"size": {"height": 8, "width": 8}, "do_normalize": True}
    one, three = (
        Preprocessing.from_processor({**size, "image_mean": m, "image_std": s}, "test")
        for m, s in ((0.5, 0.25), ([0.5] * 3, [0.25] * 3))
    )
    assert one == three


def test_processors_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(DetectorError, match="cannot follow its image processor's resize"):
        Preprocessing.from_processor({"size": {"shortest_edge": 800}}, "some model")


def save(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    path = save(tmp_path, Image.new(mode, (30, 20)), f"image.{suffix}")
    image = load_image(path, (20, 30))
    assert (image.mode, image.size) == ("RGB", (30, 20))


def test_of_sixteen_bits_the_upper_eight_are_kept(tmp_path: Path) -> None:
    """Pillow alone clips them at 255, which makes the picture white."""
    ramp = np.linspace(0, 65535, 20 * 30).astype(np.uint16).reshape(20, 30)
    path = save(tmp_path, Image.fromarray(ramp), "deep.png")
    pixels = np.asarray(load_image(path, (20, 30)))
    assert np.array_equal(pixels, np.repeat((ramp // 256)[..., None], 3, axis=2))
    for values in (np.zeros((4, 4), np.float32), np.full((4, 4), 1 << 20, np.int32)):
        path = save(tmp_path, Image.fromarray(values), "wide.tif")
        with pytest.raises(ImageError, match=r"wide.tif cannot be decoded: .* convert it to 8 or"):
            load_image(path)


def rotated(tmp_path: Path) -> Path:
    image = Image.new("RGB", (30, 20))
    image.paste((255, 255, 255), (0, 0, 15, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees
    return save(tmp_path, image, "rotated.jpg", exif=exif, quality=95)


def test_exif_rotation_follows_the_annotated_size(tmp_path: Path) -> None:
    path = rotated(tmp_path)
    assert load_image(path, (20, 30)).size == (30, 20)
    upright = load_image(path, (30, 20))
    assert upright.size == (20, 30)
    # The white half was on the left and is on top after turning.
    assert np.asarray(upright)[2, 10].min() > 200
    assert np.asarray(upright)[27, 10].max() < 50
    assert load_image(path).size == (20, 30)


def test_truncated_image_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(noise), "cut.jpg")
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ImageError, match=r"cut\.jpg cannot be decoded"):
        load_image(path, (64, 64))


def test_no_image_and_wrong_size_are_named(tmp_path: Path) -> None:
    path = tmp_path / "text.jpg"
    path.write_text("no image")
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(path)
    path = save(tmp_path, Image.new("RGB", (30, 20)), "image.png")
    with pytest.raises(ImageError, match="is 20 x 30 .* its annotation says 21 x 30"):
        load_image(path, (21, 30))
    with pytest.raises(ImageError, match="absent.png is not on disk"):
        load_image(tmp_path / "absent.png")


@pytest.mark.parametrize("size_wh", [(1, 500), (500, 1), (1, 1)])
def test_one_pixel_wide_images_have_a_size(size_wh: tuple[int, int]) -> None:
    values = COCO(Image.new("RGB", size_wh))
    assert min(values.shape) >= 1
    assert np.isfinite(values.numpy()).all()
