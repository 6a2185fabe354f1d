"""Names and sizes of images, as tools write them."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.errors import DatasetError
from tests.support.scenes import told, written


def test_sizes_and_names_come_from_the_files(tmp_path: Path, document: dict[str, Any]) -> None:
    """Backslashes, decomposed accents, sizes of -1; one file is rotated by EXIF."""
    images = tmp_path / "images"
    sizes = {}
    names = ["sub\\s\u00e9.png", "gro\u00df.png", "turned.jpg"]
    for number, (entry, name) in enumerate(zip(document["images"], names, strict=False)):
        on_disk = images / unicodedata.normalize("NFD", name.replace("\\", "/"))
        on_disk.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 2 else 1
        Image.new("RGB", (100 + number, 90)).save(on_disk, exif=exif)
        sizes[entry["id"]] = (102, 90) if number == 2 else (90, 100 + number)
        entry.update(file_name=name, height=-1, width=None)
    document["images"] = document["images"][:3]
    kept = [i["id"] for i in document["images"]]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
    for annotation in document["annotations"]:
        annotation["segmentation"] = [[5, 5, 30, 5, 30, 40]]
    path = written(tmp_path, document)
    split = load_coco_split(path, images)
    assert {e.image_id: e.size_hw for e in split.images} == sizes
    assert all((images / e.file_name).is_file() for e in split.images)
    assert any("3 of 3 images: height and width missing" in m for m in told(split))
    assert any("of 3 images: file_name is spelled otherwise" in m for m in told(split))
    with pytest.raises(DatasetError, match="has height -1 and width None in place of its size"):
        load_coco_split(path)


@pytest.mark.parametrize(
    ("written_as", "on_disk"),
    [
        ("my%20photo%201.png", "my photo 1.png"),
        ("100%25.png", "100%25.png"),
        ("a.png", "a.PNG"),
        ("a.JPG", "a.jpg"),
        ("sub\\a%20b.JPG", "sub/a b.jpg"),
        ("a.png ", "a.png"),
        ("sub/IMG_1.PNG", "sub/img_1.png"),
        ("img_1.png", "IMG_1.JPG"),
        ("sub\\a.bmp", "sub/a.jpeg"),
        ("frame_0.25", "frame_0.25.jpg"),
        ("frame_0.25", "frame_0.25"),
        ("s3://bucket/a.png?X-Signature=a%2Fb", "a.png"),
        ("/data/local-files/?d=photos%2Fmy%20a.png", "my a.png"),
    ],
)
def test_names_are_found_as_tools_write_them(
    tmp_path: Path, document: dict[str, Any], written_as: str, on_disk: str
) -> None:
    images = tmp_path / "images"
    (images / on_disk).parent.mkdir(parents=True)
    (images / on_disk).write_bytes(b"")
    document["images"][0]["file_name"] = written_as
    split = load_coco_split(written(tmp_path, document), images)
    assert split.images[0].file_name == on_disk


def test_files_of_the_same_name_are_images_only_where_all_were_converted(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    """Masks lie beside photos, and other photos differ in their capitals."""
    images = tmp_path / "images"
    images.mkdir()
    names = ["a.jpg", "b.jpg", "C.png", "c.png", "d.bmp"]
    for image, name in zip(document["images"], names, strict=False):
        image["file_name"] = name
    for name in ("b.jpg", "a.png", "b.png", "c.png", "d.png"):
        (images / name).write_bytes(b"")
    split = load_coco_split(written(tmp_path, document), images)
    found = [e.file_name for e in split.images[:5]]
    assert found == ["a.jpg", "b.jpg", "C.png", "c.png", "d.png"]


def test_a_dot_within_a_name_begins_no_ending(tmp_path: Path, document: dict[str, Any]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "frame_0.jpg").write_bytes(b"")
    document["images"][0]["file_name"] = "frame_0.25"
    document["images"][1]["file_name"] = "\u00e9" * 127  # too long in its other form
    split = load_coco_split(written(tmp_path, document), images)
    assert [e.file_name for e in split.images[:2]] == ["frame_0.25", "\u00e9" * 127]


@pytest.mark.parametrize(
    "written_as",
    [
        "/home/me/photos/{}",
        "C:\\\\photos\\\\{}",
        "..\\\\..\\\\label-studio\\\\media\\\\upload\\\\4\\\\{}",
        "/data/local-files/?d=photos/{}",
        "images/1/{}",
        "https://storage/bucket/{}",
    ],
)
def test_paths_of_another_place_are_found_by_their_last_part(
    tmp_path: Path, scenes_folder: Path, document: dict[str, Any], written_as: str
) -> None:
    names = [i["file_name"] for i in document["images"]]
    for image in document["images"]:
        image["file_name"] = written_as.replace("\\\\", "\\").format(image["file_name"])
    split = load_coco_split(written(tmp_path, document), scenes_folder / "images")
    assert [e.file_name for e in split.images] == names
    (said,) = split.faults[0].repaired
    assert said == "file_name is a path of another place, found by its last part"
    document["images"][1]["file_name"] = f"/elsewhere/{names[0]}"  # which of both is it?
    with pytest.raises(DatasetError, match="absolute|leaves"):
        load_coco_split(written(tmp_path, document), scenes_folder / "images")


def test_results_need_no_image_of_an_absolute_path(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    for image in document["images"]:
        image["file_name"] = f"/home/me/{image['file_name']}"
    split = load_coco_split(written(tmp_path, document))
    assert [f"/home/me/{e.file_name}" for e in split.images] == [
        i["file_name"] for i in document["images"]
    ]


def test_no_spelling_of_a_name_leaves_the_folder(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    for name in ("%2e%2e/secret.png", "..%2fsecret.png", f"%2f{tmp_path}/secret.png"):
        document["images"][0]["file_name"] = name
        split = load_coco_split(written(tmp_path, document), tmp_path / "images")
        assert split.images[0].file_name == name  # a file that is not there


def test_lvis_names_its_images_by_url(tmp_path: Path, document: dict[str, Any]) -> None:
    names = []
    for image in document["images"]:
        names.append(image.pop("file_name"))
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{names[-1]}"
        image[("neg_category_ids", "not_exhaustive_category_ids")[len(names) % 2]] = [3]
    split = load_coco_split(written(tmp_path, document))
    (said,) = split.faults[0].noticed
    assert said.startswith("neg_category_ids, as in LVIS:")
    assert split.faults[0].noticed[said] == len(names)
    assert [e.file_name for e in split.images] == names
    for evil in ("http://a/..", "x/%2e%2e%2fpasswd\0", ""):
        document["images"][0]["coco_url"] = evil
        with pytest.raises(DatasetError, match=r"image 100 .*file_name"):
            load_coco_split(written(tmp_path, document))


def test_a_file_that_is_listed_twice_is_worth_a_word(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    document["images"].append({**document["images"][0], "id": 7})
    name = document["images"][0]["file_name"]
    (said,) = told(load_coco_split(written(tmp_path, document)))
    assert "1 of 9 images: file_name is that of another image too, so it counts twice" in said
    assert f"(image 7 ({name}))" in said
