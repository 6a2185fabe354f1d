"""New annotations beside the features: what a new extraction would give, without the detector."""

import copy
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mfdetr_pipelines.cache.info import describe_cache
from mfdetr_pipelines.cache.relabel import RelabelSummary, run_relabel
from mfdetr_pipelines.cache.repair import run_repair
from mfdetr_pipelines.cache.verify import run_verify
from mfdetr_pipelines.compare import run_compare
from mfdetr_pipelines.config.cache import RelabelConfig, RepairConfig, VerifyConfig
from mfdetr_pipelines.config.compare import CompareConfig
from mfdetr_pipelines.config.shared import LiveDetector
from mfdetr_pipelines.evaluate import EvaluateConfig, run_evaluate
from mfdetr_pipelines.evaluate_results import run_evaluate_results
from mfdetr_pipelines.extract import run_extract
from mfdetr_pipelines.train_head import TrainHeadConfig, run_train_head

from mfdetr_cache.cache import annotations as versions
from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.cache.storage.local import LocalStorage
from mfdetr_cache.errors import CacheError, DatasetError, HeadError, TrainingError
from mfdetr_cache.reporter import SilentReporter
from mfdetr_cache.training.config import Length
from mfdetr_cache.training.recipes import build_recipe
from tests.support import scenes
from tests.support.caches import files_of
from tests.support.training import same_weights, small_recipe


def found_objects(cache: FeatureCache, document: dict[str, Any]) -> dict[str, Any]:
    """The best boxes of the detector as annotations, so that AP is high and others match."""
    annotations = []
    categories = [c["id"] for c in document["categories"]]
    for row in cache.rows:
        image = cache.read(row, ())
        height, width = image.geometry.original_hw
        for query in np.argsort(-image.class_logits.max(1))[:4]:
            cx, cy, w, h = image.boxes_cxcywh_norm[query] * (width, height, width, height)
            x0, y0 = max(cx - w / 2, 0.0), max(cy - h / 2, 0.0)
            x1, y1 = min(cx + w / 2, width), min(cy + h / 2, height)
            label = cache.label_categories[int(image.class_logits[query].argmax())]
            category = label if label in categories else categories[0]
            corners = [x0, y0, x1, y0, x1, y1, x0, y1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": cache.image_id(row),
                    "category_id": category,
                    "bbox": [float(v) for v in (x0, y0, x1 - x0, y1 - y0)],
                    "area": float((x1 - x0) * (y1 - y0)),
                    "iscrowd": 0,
                    "segmentation": [[float(v) for v in corners]],
                }
            )
    return {**document, "annotations": annotations}


@pytest.fixture(scope="module")
def better(
    tmp_path_factory: pytest.TempPathFactory, scenes_folder: Path, drawn_cache: Path
) -> Path:
    document = scenes.load_annotations(scenes_folder)
    path = tmp_path_factory.mktemp("better") / "better.json"
    path.write_text(json.dumps(found_objects(FeatureCache.open(drawn_cache), document)))
    return path


def extracted(folder: Path, weights: Path, path: Path | str, **changes: Any) -> Path:
    run_extract(scenes.extract_config(folder, str(weights), path, **changes), SilentReporter())
    return path


def relabelled(
    path: Path, annotations: Path, detector: LiveDetector | None = None
) -> RelabelSummary:
    config = RelabelConfig(str(path), annotations, detector=detector or LiveDetector())
    return run_relabel(config, SilentReporter())


def columns_of(path: Path, number: int) -> dict[str, bytes]:
    return files_of(path / versions.folder_of(number))


def test_relabelled_equals_extracted_anew(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, better: Path
) -> None:
    """Every byte of the annotations, every weight of a head, every digit of AP."""
    old = extracted(scenes_folder, rtdetr_folder, tmp_path / "old.zarr", views=1)
    new = extracted(
        scenes_folder, rtdetr_folder, tmp_path / "new.zarr", views=1, annotations=better
    )
    features = files_of(old)
    summary = relabelled(old, better)
    assert (summary.version, summary.images, summary.objects) == (1, 8, 32)
    assert summary.is_new
    assert features.items() <= files_of(old).items()
    assert columns_of(old, 1) == columns_of(new, 0)
    a, b = FeatureCache.open(old), FeatureCache.open(new)
    assert a.cache_id == b.cache_id
    assert a.annotations.annotations_id == b.annotations.annotations_id == summary.annotations_id
    recipe = small_recipe(steps=3)
    metrics = []
    for cache in (old, new):
        run = tmp_path / f"run-{cache.stem}"
        run_train_head(TrainHeadConfig(cache, run, recipe), SilentReporter())
        metrics.append(run_evaluate(EvaluateConfig(cache, run), SilentReporter()).metrics())
        document = json.loads((run / "config.json").read_text())
        assert document["annotations"]["id"] == summary.annotations_id
    assert same_weights(tmp_path / "run-old", tmp_path / "run-new")
    assert metrics[0] == metrics[1]
    assert metrics[0]["box"]["AP"] > 0.5
    assert run_verify(VerifyConfig(old, full=True), SilentReporter()).faults == ()
    # The same again is no new version.
    again = relabelled(old, better)
    assert (again.version, again.is_new, again.num_bytes) == (1, False, 0)


def test_earlier_versions_stay_and_can_be_chosen(
    tmp_path: Path, drawn_cache: Path, better: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    path = Path(shutil.copytree(drawn_cache, tmp_path / "c.zarr"))
    relabelled(path, better)
    first, newest = FeatureCache.open(f"{path}@0"), FeatureCache.open(path)
    assert (first.annotations.number, newest.annotations.number) == (0, 1)
    assert len(first.ground_truth(0)) == len(FeatureCache.open(drawn_cache).ground_truth(0)) == 2
    assert len(newest.ground_truth(0)) == 4
    assert describe_cache(path).annotations_versions == (0, 1)
    assert describe_cache(f"{path}@0").objects == 16
    with pytest.raises(CacheError, match=r"has no annotations 7; there are: 0, 1"):
        FeatureCache.open(f"{path}@7")
    # A training that goes on learns from the labels it began with.
    recipe = small_recipe(steps=2)
    run_train_head(TrainHeadConfig(f"{path}@0", tmp_path / "run", recipe), SilentReporter())
    document = json.loads((tmp_path / "run/config.json").read_text())
    assert document["annotations"]["id"] == first.annotations.annotations_id
    with pytest.raises(HeadError, match=r"cannot resume .*: annotations\.id was"):
        run_train_head(
            TrainHeadConfig(str(path), tmp_path / "run", recipe, resume=True), SilentReporter()
        )
    with pytest.raises(CacheError, match="@0 chooses annotations to read; to write, give"):
        extracted(scenes_folder, rtdetr_folder, f"{path}@0")
    # Either file names the cache that it is.
    for file in (scenes_folder / "instances.json", better):
        config = scenes.extract_config(scenes_folder, str(rtdetr_folder), path, annotations=file)
        assert run_extract(config, SilentReporter()).num_extracted == 0


def test_extract_with_other_annotations_says_what_to_do(
    drawn_cache: Path, better: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    config = scenes.extract_config(
        scenes_folder, str(rtdetr_folder), drawn_cache, annotations=better
    )
    with pytest.raises(
        CacheError, match=r"with the annotations instances, .* mfdetr cache relabel"
    ):
        run_extract(config, SilentReporter())


def test_annotations_under_another_name_are_the_same(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    path = Path(shutil.copytree(drawn_cache, tmp_path / "c.zarr"))
    renamed = Path(shutil.copy(scenes_folder / "instances.json", tmp_path / "renamed.json"))
    before = files_of(path)
    config = scenes.extract_config(scenes_folder, str(rtdetr_folder), path, annotations=renamed)
    assert run_extract(config, SilentReporter()).num_extracted == 0
    again = relabelled(path, renamed)
    assert (again.is_new, again.version) == (False, 0)
    assert again.annotations_id == FeatureCache.open(path).annotations.annotations_id
    assert files_of(path) == before


@pytest.mark.parametrize("preset", ["int8", "int8-small", "fp16"])
def test_crops_are_extracted_only_where_one_is_missing(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, better: Path, preset: str
) -> None:
    settings: dict[str, Any] = {"c1": "roi", "roi_size": 8, "preset": preset, "views": 1}
    old = extracted(scenes_folder, rtdetr_folder, tmp_path / "old.zarr", **settings)
    new = extracted(
        scenes_folder, rtdetr_folder, tmp_path / "n.zarr", annotations=better, **settings
    )
    before = files_of(old)
    with pytest.raises(CacheError, match=r"lack a query .*give --weights and --images"):
        relabelled(old, better)
    assert files_of(old) == before
    source = LiveDetector(str(rtdetr_folder), scenes_folder / "images")
    summary = relabelled(old, better, source)
    assert 1 <= summary.images_extracted <= 8
    small = {"hidden_dim": "8", "roi_size": "8", "image_layers": "1", "box_layers": "1"}
    recipe = build_recipe("paper", {**small, "points": "grid"})
    for cache in (old, new):
        run = tmp_path / f"run-{cache.stem}"
        run_train_head(TrainHeadConfig(cache, run, recipe, length=Length(2)), SilentReporter())
    assert same_weights(tmp_path / "run-old", tmp_path / "run-n")
    assert run_verify(VerifyConfig(old, full=True), SilentReporter()).faults == ()
    # Those of the first annotations are read as they were.
    first = FeatureCache.open(f"{old}@0").read(0).c1_crops
    assert first is not None
    assert len(first.query_index) == 2


def test_images_are_found_by_name_and_then_by_id(
    tmp_path: Path, drawn_cache: Path, scenes_folder: Path
) -> None:
    path = Path(shutil.copytree(drawn_cache, tmp_path / "c.zarr"))
    document = scenes.load_annotations(scenes_folder)

    def relabel(changed: dict[str, Any]) -> RelabelSummary:
        file = tmp_path / "changed.json"
        file.write_text(json.dumps(changed))
        return relabelled(path, file)

    renumbered = copy.deepcopy(document)
    for image in renumbered["images"]:
        image["id"] += 7
    for annotation in renumbered["annotations"]:
        annotation["image_id"] += 7
    assert relabel(renumbered).objects == 16
    renamed = copy.deepcopy(document)
    for image in renamed["images"]:
        image["file_name"] = f"train/{image['file_name']}"
    assert relabel(renamed).objects == 16
    fewer = copy.deepcopy(document)
    fewer["images"] = fewer["images"][:5]
    kept = {i["id"] for i in fewer["images"]}
    fewer["annotations"] = [a for a in fewer["annotations"] if a["image_id"] in kept]
    found = relabel(fewer)
    assert (found.images, found.unlisted, found.objects) == (5, 3, 10)
    assert len(FeatureCache.open(path).ground_truth(7)) == 0
    larger = copy.deepcopy(document)
    larger["images"][0]["width"] += 1
    with pytest.raises(DatasetError, match="another image; extract it again"):
        relabel(larger)
    strange = copy.deepcopy(renumbered)
    for image in strange["images"]:
        image["file_name"] = f"x{image['file_name']}"
        image["id"] += 1000
    for annotation in strange["annotations"]:
        annotation["image_id"] += 1000
    with pytest.raises(DatasetError, match="lists no image of .* by name or id"):
        relabel(strange)


def test_a_relabelling_that_was_killed_is_no_version(
    tmp_path: Path, drawn_cache: Path, better: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(drawn_cache, tmp_path / "c.zarr"))
    real, count = LocalStorage.write, []

    def killed(self: Any, key: str, pieces: Any) -> Any:
        if str(self.folder) == str(path):
            count.append(key)
            if len(count) == 12:
                raise KeyboardInterrupt
        return real(self, key, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            relabelled(path, better)
    assert FeatureCache.open(path).annotations.number == 0
    (path / versions.folder_of(1) / "views/base/label/c").mkdir(parents=True, exist_ok=True)
    (path / versions.folder_of(1) / "views/base/label/c/9").write_bytes(b"left over")
    assert relabelled(path, better).version == 1
    assert run_verify(VerifyConfig(path, full=True), SilentReporter()).faults == ()
    assert "views/base/label/c/9" not in columns_of(path, 1)


def test_repair_mends_the_version_that_its_annotation_file_is_of(
    tmp_path: Path, drawn_cache: Path, better: Path, scenes_folder: Path, rtdetr_folder: Path
) -> None:
    path = Path(shutil.copytree(drawn_cache, tmp_path / "c.zarr"))
    relabelled(path, better)
    whole = files_of(path)
    for number in (0, 1):
        (path / versions.folder_of(number) / "views/base/run_length/c/0").write_bytes(b"x")
    arguments = (str(rtdetr_folder), scenes_folder / "images")
    found = run_repair(RepairConfig(path, *arguments, better, device="cpu"), SilentReporter())
    assert not found.whole
    assert found.num_images == 0
    # The file may be called otherwise by now.
    renamed = Path(shutil.copy(scenes_folder / "instances.json", tmp_path / "renamed.json"))
    again = RepairConfig(path, *arguments, renamed, device="cpu")
    assert run_repair(again, SilentReporter()).whole
    assert files_of(path) == whole


def test_label_a_few_train_and_label_more(
    tmp_path: Path, scenes_folder: Path, rtdetr_folder: Path, drawn_cache: Path
) -> None:
    """From no annotation at all, over boxes, to masks: one extraction."""
    document = scenes.load_annotations(scenes_folder)
    nothing = tmp_path / "image_info_test-dev.json"
    nothing.write_text(json.dumps({k: document[k] for k in ("images", "categories")}))
    boxes = tmp_path / "boxes.json"
    plain = [{**a, "segmentation": None} for a in document["annotations"]]
    boxes.write_text(json.dumps({**document, "annotations": plain}))
    path = tmp_path / "c.zarr"
    extracted(scenes_folder, rtdetr_folder, path, views=1, annotations=nothing)
    whole = FeatureCache.open(path)
    assert len(whole) == 8
    assert sum(len(whole.ground_truth(row)) for row in whole.rows) == 0
    run = TrainHeadConfig(path, tmp_path / "run", small_recipe(steps=2))
    for annotations in (nothing, boxes):
        relabelled(path, annotations)
        with pytest.raises(TrainingError):
            run_train_head(run, SilentReporter())
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    cache, wanted = FeatureCache.open(path), FeatureCache.open(drawn_cache)
    augmented = cache.views["deformable-detr-0"]
    for row in cache.rows:
        assert (cache.ground_truth(row).boxes_xyxy == wanted.ground_truth(row).boxes_xyxy).all()
        assert not cache.ground_truth(row).has_mask.any()
        height, width = augmented.geometry(row).original_hw
        assert (augmented.ground_truth(row).boxes_xyxy <= [width, height, width, height]).all()
    relabelled(path, scenes_folder / "instances.json")
    run_train_head(run, SilentReporter())
    # Boxes are measured with any of them; a mask that nobody drew is none to be missed.
    with_boxes, with_masks = (
        run_evaluate(EvaluateConfig(f"{path}@{n}", tmp_path / "run"), SilentReporter()).metrics()
        for n in (1, 2)
    )
    assert with_boxes["box"] == with_masks["box"]
    # Without annotations there is no AP, but there are masks for the evaluation server.
    packed = tmp_path / "detections_test-dev2017_fast_results.zip"
    config = EvaluateConfig(f"{path}@0", tmp_path / "run", save_results=packed)
    assert run_evaluate(config, SilentReporter()).mask.AP == -1
    with zipfile.ZipFile(packed) as archive:
        (name,) = archive.namelist()
        results = json.loads(archive.read(name))
    assert name == "detections_test-dev2017_fast_results.json"
    assert {r["image_id"] for r in results} == {i["id"] for i in document["images"]}
    assert describe_cache(f"{path}@0").objects == 0
    assert run_verify(VerifyConfig(path, full=True), SilentReporter()).faults == ()


def test_results_of_ids_that_are_not_the_caches_are_the_users(
    tmp_path: Path, drawn_cache: Path, better: Path
) -> None:
    """Images exported anew under each other's ids, and categories that are text."""
    document = json.loads(better.read_text())
    ids = [i["id"] for i in document["images"]]
    others = dict(zip(ids, reversed(ids), strict=True))
    for entry in document["images"]:
        entry["id"] = others[entry["id"]]
    for entry in document["categories"]:
        entry["id"] = f"{9 - entry['id']}"
    for annotation in document["annotations"]:
        annotation["image_id"] = others[annotation["image_id"]]
        annotation["category_id"] = f"{9 - annotation['category_id']}"
    exported, cache = tmp_path / "exported.json", tmp_path / "cache.zarr"
    exported.write_text(json.dumps(document))
    shutil.copytree(drawn_cache, cache)
    relabelled(cache, exported)
    run_train_head(TrainHeadConfig(cache, tmp_path / "run", small_recipe()), SilentReporter())
    results, reporter = tmp_path / "results.json", SilentReporter()
    wanted = run_evaluate(EvaluateConfig(cache, tmp_path / "run", save_results=results), reporter)
    assert wanted.mask.AP > 0
    assert any("ids of images and categories are the cache's own" in m for m in reporter.messages)
    found = run_evaluate_results(results, exported)
    assert found.metrics()["mask"] == wanted.mask.to_dict()
    compared = run_compare(
        CompareConfig((tmp_path / "run", results), (str(cache),), exported, samples=2),
        SilentReporter(),
    )
    assert [s.mask for s in compared.subjects] == [wanted.mask] * 2
