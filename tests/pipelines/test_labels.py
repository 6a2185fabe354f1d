"""Categories and labels are chosen beside the features, and everything after goes by them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfdetr_pipelines.cache.relabel import run_relabel
from mfdetr_pipelines.cache.repair import run_repair
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.config.cache import RelabelConfig, RepairConfig, VerifyConfig
from mfdetr_pipelines.config.shared import LiveDetector
from mfdetr_pipelines.evaluate import EvaluateConfig, run_evaluate
from mfdetr_pipelines.extract import ExtractSummary, run_extract
from mfdetr_pipelines.train_head import TrainHeadConfig, run_train_head

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.coco.options import LabelOptions, parse_map
from mfdetr_cache.errors import CacheError, ConfigError, DatasetError
from mfdetr_cache.evaluation.cached_boxes import cached_box_metrics
from mfdetr_cache.model import MaskFrozenDETR
from mfdetr_cache.reporter import SilentReporter
from tests.support import scenes
from tests.support.training import small_recipe


def extracted(
    folder: Path, weights: Path, cache: Path, reporter: SilentReporter | None = None, **options: Any
) -> ExtractSummary:
    config = scenes.extract_config(folder, str(weights), cache, labels=LabelOptions(**options))
    return run_extract(config, reporter or SilentReporter())


@pytest.fixture(scope="module")
def agnostic(
    tmp_path_factory: pytest.TempPathFactory, scenes_folder: Path, rtdetr_folder: Path
) -> Path:
    path = tmp_path_factory.mktemp("labels") / "any.zarr"
    extracted(scenes_folder, rtdetr_folder, path, class_agnostic=True)
    return path


def test_the_features_are_the_same_and_the_classes_are_one(
    drawn_cache: Path, agnostic: Path
) -> None:
    plain, one = FeatureCache.open(drawn_cache), FeatureCache.open(agnostic)
    assert plain.cache_id == one.cache_id
    assert plain.annotations.annotations_id != one.annotations.annotations_id
    assert (one.spec.num_labels, one.spec.label_names) == (1, ("object",))
    assert (one.label_categories, one.categories) == ((1,), [{"id": 1, "name": "object"}])
    for row in plain.rows:
        apart, same = plain.read(row), one.read(row)
        np.testing.assert_array_equal(same.class_logits, apart.class_logits.max(-1, keepdims=True))
        np.testing.assert_array_equal(same.queries, apart.queries)
        assert same.ground_truth.labels.tolist() == [0] * len(apart.ground_truth)
        assert len(apart.ground_truth)


def test_relabelled_is_extracted(
    tmp_path: Path, agnostic: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    """One way and back, to the last bit of the box AP."""
    path = tmp_path / "c.zarr"
    extracted(scenes_folder, rtdetr_folder, path)
    before = cached_box_metrics(FeatureCache.open(path))
    annotations = scenes_folder / "instances.json"
    for options, wanted in (
        (LabelOptions(class_agnostic=True), cached_box_metrics(FeatureCache.open(agnostic))),
        (LabelOptions(), before),
    ):
        config = RelabelConfig(path, annotations, labels=options, device="cpu")
        assert run_relabel(config, SilentReporter()).is_new
        assert cached_box_metrics(FeatureCache.open(path)) == wanted


def test_a_head_of_any_object_is_trained_measured_and_used(
    tmp_path: Path, agnostic: Path, drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    head = tmp_path / "head"
    run_train_head(
        TrainHeadConfig(agnostic, head, small_recipe(mask_scoring="true")), SilentReporter()
    )
    measured = run_evaluate(EvaluateConfig(agnostic, head, device="cpu"), SilentReporter())
    (only,) = measured.details["mask"]["categories"]
    assert (only["name"], only["objects"]) == ("object", 16)
    model = MaskFrozenDETR.from_pretrained(rtdetr_folder, head, device="cpu")
    image = sorted((scenes_folder / "images").iterdir())[0]
    found = model(image, threshold=0.0, top_k=3)
    assert found.names == ("object",) * 3
    live = LiveDetector(str(rtdetr_folder), scenes_folder / "images")
    assert not run_verify(VerifyConfig(agnostic, live=2, detector=live), SilentReporter()).faults
    with pytest.raises(Exception, match="come from different detectors"):
        run_evaluate(EvaluateConfig(drawn_cache, head, device="cpu"), SilentReporter())


def test_a_cache_with_chosen_labels_is_mended_and_goes_on(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    path = tmp_path / "c.zarr"
    options = {"map": {"box": "ellipse"}, "only": ("ellipse", "box")}
    summary = extracted(scenes_folder, rtdetr_folder, path, **options)
    assert [(c.name, c.label, c.rule) for c in summary.categories] == [
        ("ellipse", "ellipse", "name"),
        ("box", "ellipse", "map"),
    ]
    cache = FeatureCache.open(path)
    assert cache.categories == [{"id": 3, "name": "ellipse"}]
    assert set(cache.ground_truth(0).category_ids.tolist()) == {3}
    assert cache.annotations.source["map"] == {"box": "ellipse"}
    assert extracted(scenes_folder, rtdetr_folder, path, **options).num_extracted == 0
    with pytest.raises(CacheError, match="mfdetr cache relabel"):
        extracted(scenes_folder, rtdetr_folder, path)
    next(f for f in path.glob("views/base/queries/c/**/*") if f.is_file()).unlink()
    images, annotations = scenes_folder / "images", scenes_folder / "instances.json"
    config = RepairConfig(path, str(rtdetr_folder), images, annotations, device="cpu")
    assert run_repair(config, SilentReporter()).whole


def test_what_has_no_label_is_said(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    document = scenes.load_annotations(scenes_folder)
    document["categories"][1]["name"] = "carton"
    document["annotations"][0]["segmentation"] = [[5, 5, 1e9, 5, 9, 9]]
    (tmp_path / "images").symlink_to(scenes_folder / "images")
    (tmp_path / "instances.json").write_text(json.dumps(document))
    with pytest.raises(DatasetError, match="1 of 16 annotations cannot be used"):
        extracted(tmp_path, rtdetr_folder, tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()
    reporter = SilentReporter()
    config = scenes.extract_config(
        tmp_path, str(rtdetr_folder), tmp_path / "c.zarr", on_bad_annotation="skip"
    )
    summary = run_extract(config, reporter)
    assert summary.left_out == {"images": 0, "annotations": 1}
    said = "\n".join(reporter.messages)
    assert "left out: 1 of 16 annotations cannot be used: annotation 1000 of image 100" in said
    assert "1 annotated categories have no label of" in said
    assert "8 of 15 objects: carton (8); nothing is learned from them" in said
    with pytest.raises(DatasetError, match="--only sofa: the dataset has no such category"):
        extracted(scenes_folder, rtdetr_folder, tmp_path / "d.zarr", only=("sofa",))


def test_maps_are_typed_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "map.txt"
    file.write_text("# ours = theirs\npedestrian = person\n\nvan=car\n")
    assert parse_map([str(file), "a b=c"]) == {"pedestrian": "person", "van": "car", "a b": "c"}
    with pytest.raises(ValueError, match="write category=label"):
        parse_map(["pedestrian"])
    with pytest.raises(ConfigError, match="--class-agnostic has one label for all"):
        LabelOptions(map={"a": "b"}, class_agnostic=True)
