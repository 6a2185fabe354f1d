"""A dataset as a tool exported it: ids from 0, categories that the detector has no name for."""

import json
from pathlib import Path
from typing import Any

import pytest
from mfdetr_pipelines.config.extract import ExtractConfig
from mfdetr_pipelines.extract import run_extract

from mfdetr_cache.reporter import SilentReporter

pytestmark = pytest.mark.slow

UNKNOWN = ("deer", "otter", "rhesus monkey", "tiger", "turtle")


def part_of_animals(shared: Path, folder: Path, shift: int) -> dict[str, Any]:
    """Six pictures of the test split in Roboflow's layout; ids begin at ``shift``."""
    exported = json.loads((shared / "animals/test/_annotations.coco.json").read_text())
    assert min(e["id"] for key in ("images", "annotations") for e in exported[key]) == 0
    images = exported["images"][:6]
    kept = {i["id"] for i in images}
    annotations = [a for a in exported["annotations"] if a["image_id"] in kept]
    (folder / "test").mkdir(parents=True)
    for image in images:
        file = shared / "animals/test" / image["file_name"]
        (folder / "test" / image["file_name"]).symlink_to(file)
    for entry in [*images, *annotations]:
        entry["id"] += shift
    for annotation in annotations:
        annotation["image_id"] += shift
    document = {**exported, "images": images, "annotations": annotations}
    (folder / "test/_annotations.coco.json").write_text(json.dumps(document))
    return document


def test_an_export_is_taken_as_it_is_and_ids_from_0_change_no_digit(
    shared: Path, tmp_path: Path
) -> None:
    weights = str(shared / "detectors/deimv2-femto-coco")
    found = []
    for shift in (0, 1000):
        folder, reporter = tmp_path / str(shift), SilentReporter()
        document = part_of_animals(shared, folder, shift)
        cache = folder / "c.zarr"
        config = ExtractConfig(weights, cache, dataset=folder, split="test", device="cpu")
        summary = run_extract(config, reporter)
        assert summary.box is not None
        found.append((summary.box, summary.categories))
        names = {c["id"]: c["name"] for c in document["categories"]}
        lacking = [
            name for a in document["annotations"] if (name := names[a["category_id"]]) in UNKNOWN
        ]
        told = next(m for m in reporter.messages if "have no label of" in m)
        assert f"{len(set(lacking))} annotated categories have no label of" in told
        assert f", {len(lacking)} of {len(document['annotations'])} objects: " in told
        assert all(f"{name} ({lacking.count(name)})" in told for name in set(lacking))
    assert found[0] == found[1]
    assert found[0][0].AP > 0.05
