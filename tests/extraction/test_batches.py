"""Which images share a batch is a matter of the part alone."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mfdetr_pipelines.extract import run_extract
from PIL import Image

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.extraction import batches
from mfdetr_cache.extraction.batches import batches_of_part
from mfdetr_cache.reporter import SilentReporter
from tests.support import detectors, scenes

CPU = torch.device("cpu")
SIZES = st.sampled_from([(64, 64), (640, 640), (800, 1333)])


@given(st.lists(SIZES, min_size=1, max_size=64), st.integers(0, 1000))
def test_a_part_is_divided_into_batches_of_one_size(
    sizes: list[tuple[int, int]], first: int
) -> None:
    rows = range(first, first + len(sizes))
    found = batches_of_part(rows, sizes, CPU)
    assert sorted(row for batch in found for row in batch) == list(rows)
    assert [batch[0] for batch in found] == sorted(batch[0] for batch in found)
    for batch in found:
        (height, width), *others = {sizes[row - first] for row in batch}
        assert not others
        assert len(batch) == 1 or len(batch) * height * width <= 2**20
    # Not one batch more than it takes.
    most = {(64, 64): 16, (640, 640): 2, (800, 1333): 1}
    assert len(found) == sum(-(-sizes.count(size) // n) for size, n in most.items())


def test_a_gpu_takes_more_at_once() -> None:
    rows, sizes = range(4), [(800, 1066)] * 4
    assert batches_of_part(rows, sizes, torch.device("cuda")) == [(0, 1, 2, 3)]


def mixed_scenes(folder: Path) -> Path:
    """Scenes of two sizes by turns, as the network sees them."""
    document = scenes.write_scenes(folder, 6, seed=4)
    for number, image in enumerate(document["images"]):
        height, width = (80, 120) if number % 2 else (120, 80)
        picture = folder / "images" / image["file_name"]
        with Image.open(picture) as opened:
            opened.resize((width, height)).save(picture)
        image |= {"height": height, "width": width}
    for annotation in document["annotations"]:
        annotation["bbox"], annotation["area"] = [5, 5, 30, 30], 900.0
        annotation["segmentation"] = [[5, 5, 35, 5, 35, 35, 5, 35]]
    scenes.save_annotations(folder, document)
    return folder


def extract(folder: Path, weights: Path, cache: Path, **changes: object) -> FeatureCache:
    config = scenes.extract_config(folder, str(weights), cache, **changes)
    run_extract(config, SilentReporter())
    return FeatureCache.open(cache)


def test_rows_of_mixed_sizes_are_written_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same features as one by one, up to sums in another order, each at its own row."""
    folder, weights = mixed_scenes(tmp_path / "scenes"), tmp_path / "detector"
    detectors.save_deformable_detr(weights)
    together = extract(folder, weights, tmp_path / "together.zarr")
    monkeypatch.setitem(batches._MOST, "cpu", 1)
    alone = extract(folder, weights, tmp_path / "alone.zarr")
    assert len({image.geometry.input_hw for image in together}) == 2
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.file_name == theirs.file_name
        torch.testing.assert_close(
            torch.from_numpy(ours.class_logits),
            torch.from_numpy(theirs.class_logits),
            atol=1e-4,
            rtol=1e-4,
        )


def test_a_mended_image_changes_no_other_row(tmp_path: Path, rtdetr_folder: Path) -> None:
    """A black image had its place in the batch."""
    document = scenes.write_scenes(tmp_path / "whole", 5, seed=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "bad")
    name = document["images"][1]["file_name"]
    (tmp_path / "bad/images" / name).write_bytes(b"no image")
    bad = extract(tmp_path / "bad", rtdetr_folder, tmp_path / "bad.zarr", on_bad_image="skip")
    whole = extract(tmp_path / "whole", rtdetr_folder, tmp_path / "whole.zarr")
    assert bad.rows == (0, 2, 3, 4)
    for row in bad.rows:
        ours, theirs = bad.read(row), whole.read(row)
        assert (ours.class_logits == theirs.class_logits).all()
        assert (ours.queries == theirs.queries).all()
        for name, stored in ours.maps.items():
            assert (stored.to_array() == theirs.maps[name].to_array()).all()
