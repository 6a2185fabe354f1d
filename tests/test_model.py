"""Detector and head as one model from Python: what ``mfdetr predict`` finds, in several forms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mfdetr_pipelines.config.predict import PredictConfig
from mfdetr_pipelines.config.train_head import TrainHeadConfig
from mfdetr_pipelines.predict import run_predict
from mfdetr_pipelines.train_head import run_train_head
from PIL import Image
from pycocotools import mask as coco_mask

import mfdetr_cache
from mfdetr_cache.detectors.images import load_image
from mfdetr_cache.errors import HeadError, IdentityError, ImageError
from mfdetr_cache.evaluation.segmentation import TimedSegmentation
from mfdetr_cache.model import _TOGETHER, MaskFrozenDETR
from mfdetr_cache.reporter import SilentReporter
from tests.support import detectors
from tests.support.training import small_recipe


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, drawn_cache: Path) -> Path:
    out = tmp_path_factory.mktemp("model") / "head"
    run_train_head(TrainHeadConfig(drawn_cache, out, small_recipe()), SilentReporter())
    return out


@pytest.fixture(scope="module")
def model(rtdetr_folder: Path, head: Path) -> MaskFrozenDETR:
    return MaskFrozenDETR.from_pretrained(rtdetr_folder, head, device="cpu")


@pytest.fixture
def picture(scenes_folder: Path) -> Path:
    return sorted((scenes_folder / "images").iterdir())[0]


def test_it_finds_what_predict_finds(
    model: MaskFrozenDETR, picture: Path, head: Path, rtdetr_folder: Path, tmp_path: Path
) -> None:
    found = model(picture, threshold=0.0, top_k=5)
    config = PredictConfig(
        (str(picture),), str(rtdetr_folder), head, tmp_path, threshold=0.0, top_k=5
    )
    summary = run_predict(config, SilentReporter())
    written = json.loads(summary.results.read_text())
    assert [r["score"] for r in written] == pytest.approx(found.scores.tolist(), rel=1e-6)
    assert [r["segmentation"] for r in written] == [r["segmentation"] for r in found.to_coco(1)]
    assert (np.diff(found.scores) <= 0).all()


def test_it_prints_as_a_short_table(model: MaskFrozenDETR, picture: Path) -> None:
    assert mfdetr_cache.MaskFrozenDETR is MaskFrozenDETR
    found = model(picture, threshold=0.0, top_k=3)
    title, *lines = repr(found).splitlines()
    assert title.startswith("3 objects in ")
    for line, name, mask in zip(lines, found.names, found.masks, strict=True):
        assert line.startswith(name)
        assert line.endswith(f"mask {mask.sum()} px")


def test_every_kind_of_image_gives_the_same(model: MaskFrozenDETR, picture: Path) -> None:
    with Image.open(picture) as file:
        opened = file.convert("RGB")
    forms: list[Any] = [picture, str(picture), opened, np.asarray(opened)]
    results = [model(form, threshold=0.0, top_k=3) for form in forms]
    for result in results[1:]:
        assert (result.masks == results[0].masks).all()
        assert (result.scores == results[0].scores).all()
    assert results[0].masks.shape == (3, opened.height, opened.width)
    gray = opened.convert("L")
    as_array = model(np.asarray(gray), threshold=0.0, top_k=3)
    assert (as_array.scores == model(gray, threshold=0.0, top_k=3).scores).all()
    with pytest.raises(ImageError, match="is not on disk"):
        model("absent.png")


def test_a_list_is_its_images_one_by_one(
    model: MaskFrozenDETR, scenes_folder: Path, tmp_path: Path
) -> None:
    pictures = sorted((scenes_folder / "images").iterdir())[:4]
    together = model(pictures, threshold=0.0, top_k=3)
    for picture, found in zip(pictures, together, strict=True):
        alone = model(picture, threshold=0.0, top_k=3)
        assert (found.scores == alone.scores).all()
        assert (found.masks == alone.masks).all()
    assert model([]) == []
    with pytest.raises(ImageError, match="is not on disk"):
        model([pictures[0], tmp_path / "absent.png", pictures[1]])


@pytest.mark.parametrize("most", [1, 2, 8])
def test_neighbours_of_one_size_share_a_batch(
    most: int, model: MaskFrozenDETR, scenes_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; what cannot be read stands alone, and the order stays."""
    monkeypatch.setitem(_TOGETHER, "cpu", most)
    files = sorted((scenes_folder / "images").iterdir())[:5]
    items = [*files[:2], Path("absent"), *files[2:]]
    found = list(model.stream(items, load_image, threshold=0.0, top_k=3))
    assert [item for item, _ in found] == items
    assert isinstance(found.pop(2)[1], ImageError)
    for file, timed in found:
        assert isinstance(timed, TimedSegmentation)
        alone = model(file, threshold=0.0, top_k=3)
        assert timed.result.scores == pytest.approx(alone.scores, rel=1e-4)
        assert timed.result.masks.sum() == pytest.approx(alone.masks.sum(), rel=1e-2)


@pytest.mark.filterwarnings("ignore:OpenCV .* is not installed")
def test_the_forms_of_a_result_say_the_same(model: MaskFrozenDETR, picture: Path) -> None:
    found = model(picture, threshold=0.0, top_k=4)
    torchvision = found.to_torchvision()
    assert torchvision["masks"].shape == (4, 1, *found.masks.shape[1:])
    assert torchvision["boxes"].dtype == torch.float32
    supervision = found.to_supervision()
    assert (supervision.mask == found.masks).all()
    assert list(supervision.data["class_name"]) == list(found.names)
    for index, result in enumerate(found.to_coco(7)):
        decoded = coco_mask.decode(result["segmentation"]).astype(bool)
        assert (decoded == found.masks[index]).all()
        assert result["image_id"] == 7
    with Image.open(picture) as opened:
        assert found.draw(opened.convert("RGB")).size == opened.size
    nothing = model(picture, threshold=1.1)
    assert len(nothing) == 0
    assert nothing.masks.shape == (0, *found.masks.shape[1:])
    assert nothing.to_coco(1) == []
    assert len(nothing.to_supervision()) == 0


def test_a_saved_head_is_the_same_model(
    model: MaskFrozenDETR, picture: Path, rtdetr_folder: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "saved")
    again = MaskFrozenDETR.from_pretrained(rtdetr_folder, tmp_path / "saved", device="cpu")
    first, second = (m(picture, threshold=0.0, top_k=3) for m in (model, again))
    assert (first.masks == second.masks).all()
    assert (first.scores == second.scores).all()


def test_heads_that_do_not_belong_are_refused(
    head: Path, tmp_path: Path, rtdetr_folder: Path
) -> None:
    detectors.save_rtdetr(tmp_path / "other", seed=9)
    with pytest.raises(IdentityError, match="come from different detectors"):
        MaskFrozenDETR.from_pretrained(tmp_path / "other", head)
    with pytest.raises(HeadError, match="somebody/no-such-head is no folder and not on the hub"):
        MaskFrozenDETR.from_pretrained(rtdetr_folder, "somebody/no-such-head")
    with pytest.raises(HeadError, match="is no trained head"):
        MaskFrozenDETR.from_pretrained(rtdetr_folder, tmp_path)
