"""A dataset with pasted objects is a dataset like any other."""

import json
from pathlib import Path

import numpy as np
import pytest
from mfdetr_pipelines.config.copy_paste import CopyPasteConfig
from mfdetr_pipelines.copy_paste import run_copy_paste
from mfdetr_pipelines.extract import run_extract
from PIL import Image
from pycocotools.coco import COCO

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.annotations import load_coco_split
from mfdetr_cache.errors import ConfigError, DatasetError, ImageError, StoppedError
from mfdetr_cache.reporter import SilentReporter
from tests.support import scenes


def config(folder: Path, out: Path, **changes: int) -> CopyPasteConfig:
    return CopyPasteConfig(
        out, images=folder / "images", annotations=folder / "instances.json", **changes
    )


def test_it_is_extracted_like_any_other(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    summary = run_copy_paste(config(scenes_folder, tmp_path / "a", copies=2), SilentReporter())
    before = load_coco_split(scenes_folder / "instances.json")
    after = load_coco_split(summary.annotations)
    assert len(after.images) == summary.num_images == 3 * len(before.images)
    originals = after.images[::3]
    assert originals == before.images
    for entry in originals:
        name = entry.file_name
        original = (scenes_folder / "images" / name).read_bytes()
        assert (summary.images / name).read_bytes() == original
        kept, there = (s.ground_truth(entry, {}) for s in (after, before))
        for name in ("category_ids", "boxes_xyxy", "areas", "is_crowd"):
            np.testing.assert_array_equal(getattr(kept, name), getattr(there, name))
        for ours, theirs in zip(kept.run_lengths, there.run_lengths, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    document = json.loads(summary.annotations.read_text())
    numbers = [a["id"] for a in document["annotations"]]
    assert len(set(numbers)) == len(numbers) == summary.num_objects
    # What pycocotools makes of the outlines is what is said about them.
    coco = COCO(str(summary.annotations))
    old = {e.image_id for e in originals}
    pasted = [a for a in document["annotations"] if a["image_id"] not in old]
    assert len(pasted) > 2 * sum(len(v) for v in before.annotations.values())
    for annotation in pasted:
        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        x, y, w, h = annotation["bbox"]
        assert mask[y : y + h, x : x + w].sum() == mask.sum()
        assert mask[y].any()
        assert mask[y + h - 1].any()
        assert mask[:, x].any()
        assert mask[:, x + w - 1].any()
    extraction = scenes.extract_config(tmp_path / "a", str(rtdetr_folder), tmp_path / "c.zarr")
    run_extract(extraction, SilentReporter())
    assert len(FeatureCache.open(tmp_path / "c.zarr")) == summary.num_images


def test_the_same_command_begins_again_where_one_was_stopped(
    tmp_path: Path, scenes_folder: Path
) -> None:
    class Stopping(SilentReporter):
        def advance(self, count: int = 1, *, num_bytes: int = 0, note: str = "") -> None:
            raise StoppedError("stopped")

    mine = tmp_path / "mine"
    mine.mkdir()
    for out in (tmp_path / "a", tmp_path / "linked"):
        with pytest.raises(StoppedError):
            run_copy_paste(config(scenes_folder, out, copies=2), Stopping())
        assert [p.name for p in out.iterdir()] == ["images.partial"]
        if out.name == "linked":
            (out / "images.partial").rename(tmp_path / "elsewhere")
            (out / "images.partial").symlink_to(mine)
        found = run_copy_paste(config(scenes_folder, out, copies=1), SilentReporter())
        listed = {e.file_name for e in load_coco_split(found.annotations).images}
        assert {p.name for p in found.images.iterdir()} == listed
        assert {p.name for p in out.iterdir()} == {"images", "instances.json"}
    assert list(mine.iterdir()) == []


def test_what_is_whole_is_not_made_again_and_what_is_stale_is_no_result(
    tmp_path: Path, scenes_folder: Path
) -> None:
    folder, out = tmp_path / "few", tmp_path / "out"
    document = scenes.write_scenes(folder, count=2, seed=0)
    first = run_copy_paste(config(folder, out, copies=1), SilentReporter())
    (out / "images/witness").touch()
    assert run_copy_paste(config(folder, out, copies=1), SilentReporter()) == first
    assert (out / "images/witness").exists()
    # Killed between its last two writes.
    (out / "images").rename(out / "images.partial")
    assert run_copy_paste(config(folder, out, copies=1), SilentReporter()) == first
    assert len(list(first.images.iterdir())) == first.num_images
    picture = folder / "images" / document["images"][0]["file_name"]
    plain = picture.read_bytes()
    Image.fromarray(np.asarray(Image.open(picture)) // 2).save(picture)
    with pytest.raises(ConfigError, match="is no empty folder; nothing was touched"):
        run_copy_paste(config(folder, out, copies=1), SilentReporter())
    picture.write_bytes(plain)
    document["annotations"].pop()
    (folder / "instances.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="is no empty folder; nothing was touched"):
        run_copy_paste(config(folder, out, copies=1), SilentReporter())


def test_the_seed_alone_decides(tmp_path: Path, scenes_folder: Path) -> None:
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        found = run_copy_paste(
            config(scenes_folder, tmp_path / name, copies=1, seed=seed), SilentReporter()
        )
        files = {p.name: p.read_bytes() for p in found.images.iterdir()}
        made.append((files, found.annotations.read_bytes()))
    assert made[0] == made[1]
    assert made[0] != made[2]


@pytest.mark.parametrize("spelled", ["{}-pasted1.jpg", "./{}-pasted1.jpg", "{}-PASTED1.JPG"])
def test_names_that_are_taken_are_not_used(tmp_path: Path, spelled: str) -> None:
    folder = tmp_path / "few"
    scenes.write_scenes(folder, count=2, seed=0)
    document = json.loads((folder / "instances.json").read_text())
    first, second = (i["file_name"] for i in document["images"])
    taken = spelled.format(Path(first).stem)
    Image.open(folder / "images" / second).save(folder / "images" / taken)
    document["images"][1]["file_name"] = taken
    (folder / "instances.json").write_text(json.dumps(document))
    found = run_copy_paste(config(folder, tmp_path / "out", copies=1), SilentReporter())
    names = [e.file_name for e in load_coco_split(found.annotations).images]
    assert len({str(Path(name)).casefold() for name in names}) == 4
    assert sorted(p.name for p in found.images.iterdir()) == sorted(Path(n).name for n in names)
    np.testing.assert_array_equal(
        np.asarray(Image.open(found.images / taken)),
        np.asarray(Image.open(folder / "images" / taken)),
    )


def test_bad_input_is_one_line_and_touches_nothing(tmp_path: Path, scenes_folder: Path) -> None:
    with pytest.raises(ConfigError, match="--copies 0"):
        run_copy_paste(config(scenes_folder, tmp_path / "a", copies=0), SilentReporter())
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is no empty folder; nothing was touched"):
        run_copy_paste(config(scenes_folder, used), SilentReporter())
    assert [p.name for p in used.iterdir()] == ["mine.txt"]
    document = json.loads((scenes_folder / "instances.json").read_text())
    for annotation in document["annotations"]:
        annotation["iscrowd"] = 1
    crowds = tmp_path / "crowds"
    crowds.mkdir()
    (crowds / "instances.json").write_text(json.dumps(document))
    (crowds / "images").symlink_to(scenes_folder / "images")
    with pytest.raises(DatasetError, match="no object of 400 pixels or more that is no crowd"):
        run_copy_paste(config(crowds, tmp_path / "b"), SilentReporter())
    (crowds / "images").unlink()
    (crowds / "images").mkdir()
    with pytest.raises(ImageError, match="images are not in"):
        run_copy_paste(config(crowds, tmp_path / "b"), SilentReporter())
    assert not (tmp_path / "b").exists()
