"""Detectors without queries: their detections are torchvision's, the rest of the queries absent."""

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection._utils import overwrite_eps

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.conformance import DetectorConformance
from mfdetr_cache.detectors.labels import COCO_NAMES
from mfdetr_cache.detectors.options import DetectorOptions, options_of
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import list_detectors, load_detector, load_with_options_of
from mfdetr_cache.detectors.torchvision import loading
from mfdetr_cache.detectors.torchvision.loading import MODELS, recognised_torchvision
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.identity import detector_identity
from mfdetr_cache.ops.boxes import cxcywh_to_xyxy, scale_boxes
from mfdetr_cache.types import ABSENT_LOGIT
from tests.support.small_torchvision import small_model, write_small

FASTER, RETINA, FCOS = (
    f"torchvision:{n}_resnet50_fpn" for n in ("fasterrcnn", "retinanet", "fcos")
)
PICTURES = [(92, 129), (100, 71), (64, 64)]


def picture(size_hw: tuple[int, int], seed: int = 0) -> Image.Image:
    height, width = size_hw
    noise = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def own_detections(model: Any, image: Image.Image) -> dict[str, torch.Tensor]:
    """What torchvision finds in a picture, as its users call it."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    with torch.no_grad():
        found: dict[str, torch.Tensor] = model([pixels])[0]
    return found


class TestConformance(DetectorConformance):
    """All three kinds, from state dicts."""

    @pytest.fixture(autouse=True, params=[FASTER, RETINA, FCOS])
    def _one_kind(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.name: str = request.param
        self.path = tmp_path / "model.pth"
        write_small(self.path, self.name.removeprefix("torchvision:"), monkeypatch)

    def make_detector(self) -> Detector:
        return load_detector(self.name, str(self.path))


class TestPage(DetectorConformance):
    """The detector without queries of docs/adding-a-detector.md, as it stands there."""

    def make_detector(self) -> Detector:
        page = Path(__file__).parents[2] / "docs/adding-a-detector.md"
        code = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        names: dict[str, Any] = {}
        exec(next(block for block in code if "ABSENT_LOGIT" in block), names)
        torch.manual_seed(0)
        detector: Detector = names["MyDetector"](_Network(), ("cat", "dog"))
        return detector

    def test_scores_come_back(self) -> None:
        logits = self._run(self.make_detector()).class_logits[0]
        assert logits.sigmoid().max(-1).values[:3].tolist() == pytest.approx([0.9, 0.5, 0])


class _Network(nn.Module):
    """Finds two boxes in every image."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 256, 4, 4), nn.Conv2d(3, 256, 8, 8)

    def forward(self, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[Any]]:
        maps = {"c1": self.fine(pixels), "encoder8": self.coarse(pixels)}
        boxes = torch.tensor([[4.0, 8, 60, 70], [0, 0, 30, 20]])
        vectors = maps["encoder8"].mean((2, 3))
        labels, scores = torch.tensor([1, 0]), torch.tensor([0.9, 0.5])
        return maps, [(scores, labels, boxes, v.expand(2, -1)) for v in vectors]


@pytest.mark.parametrize("name", [FASTER, RETINA, FCOS])
def test_detections_are_torchvisions_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Equal boxes, scores and labels in equal order; queries beyond are absent."""
    model = write_small(tmp_path / "m.pth", name.removeprefix("torchvision:"), monkeypatch)
    detector = load_detector(name, str(tmp_path / "m.pth"))
    counts = set()
    for seed, size_hw in enumerate(PICTURES):
        image = picture(size_hw, seed)
        wanted = own_detections(model, image)
        output = detector.forward(detector.preprocess(image)[None])
        logits, count = output.class_logits[0], len(wanted["scores"])
        counts.add(count)
        scores, labels = logits[:count].sigmoid().max(-1) if count else (logits[:0, 0],) * 2
        # A logit below 16 has a rounding error of 2^-21, by which a probability moves a quarter of
        # that at most; its own rounding comes on top.
        assert torch.allclose(scores, wanted["scores"], rtol=0, atol=2**-22)
        assert labels.tolist() == (wanted["labels"] - (name == FASTER) * 1).tolist()
        # Four roundings of numbers up to 1, in pixels.
        found = scale_boxes(cxcywh_to_xyxy(output.boxes_cxcywh_norm[0]), size_hw)
        assert torch.allclose(found[:count], wanted["boxes"], rtol=0, atol=4 * 2**-24 * 129)
        # One label for each query, and none for the others.
        assert (logits > ABSENT_LOGIT).sum(-1).tolist() == [1] * count + [0] * (len(logits) - count)
        assert not output.queries[0, count:].any()
        assert not output.boxes_cxcywh_norm[0, count:].any()
    assert len(counts) > 1
    assert max(counts) < detector.spec.num_queries


def test_a_query_is_the_vector_that_was_classified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classifier applied to the query gives the score of the detection."""
    model = write_small(tmp_path / "m.pth", "fasterrcnn_resnet50_fpn", monkeypatch)
    detector = load_detector(FASTER, str(tmp_path / "m.pth"))
    output = detector.forward(detector.preprocess(picture(PICTURES[1], 1))[None])
    present = (output.class_logits[0] > ABSENT_LOGIT).any(-1)
    assert present.sum() > 10
    with torch.no_grad():
        logits = model.roi_heads.box_predictor(output.queries[0][present])[0]
    stored, label = output.class_logits[0][present].sigmoid().max(-1)
    found = logits.softmax(-1)[torch.arange(len(label)), label + 1]
    assert torch.allclose(found, stored, rtol=1e-5)


@pytest.mark.parametrize("name", [RETINA, FCOS])
def test_a_query_is_the_mean_of_its_level_over_the_box(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On a level of columns' positions: the box's middle, and half of torchvision's cell of 8."""
    write_small(tmp_path / "m.pth", name.removeprefix("torchvision:"), monkeypatch)
    detector: Any = load_detector(name, str(tmp_path / "m.pth"))
    ramps = {
        str(i): (torch.arange(32 // 2**i) + 0.5).mul(8 * 2**i).expand(1, 64, 32 // 2**i, -1)
        for i in range(3)
    }
    boxes = torch.tensor([[40.0, 30.0, 70.0, 80.0], [50.0, 60.0, 220.0, 240.0]])
    (vectors,) = detector._vectors([{"boxes": boxes}], ramps, (256, 256))
    assert torch.allclose(vectors[:, 0], (boxes[:, 0] + boxes[:, 2]) / 2 + 4)


def test_the_published_builders_are_recognised() -> None:
    """By the names of their tensors; two have the same and are both named."""
    for name, model in MODELS.items():
        with torch.device("meta"):
            built = get_model(name.partition(":")[2], weights=None, weights_backbone=None)
        found = recognised_torchvision(Checkpoint(Path("m.pth"), built.state_dict()))
        mobile = [n for n in MODELS if "mobilenet" in n]
        assert found == (mobile if name in mobile else [name])
        last = built.roi_heads if "faster" in name else built
        assert model.queries == last.detections_per_img
        listed = {d.name: d for d in list_detectors()}[name]
        assert listed.queries == str(model.queries)
    assert not recognised_torchvision(Checkpoint(Path("m.pth"), {"a": torch.ones(1)}))


def test_frozen_norms_without_epsilon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file cannot say it: the name does, unless it is the file that torchvision publishes."""
    path = tmp_path / "m.pth"
    model = write_small(path, "fasterrcnn_resnet50_fpn", monkeypatch, frozen=True)
    image = picture(PICTURES[0])
    with pytest.raises(DetectorError, match=f"can be {FASTER} or {FASTER}-eps0: the file does not"):
        load_detector("auto", str(path))
    scores = []
    for name in (FASTER, f"{FASTER}-eps0"):
        detector = load_detector(name, str(path))
        assert detector.spec.detector == name.removesuffix("-eps0") + name[len(FASTER) :]
        output = detector.forward(detector.preprocess(image)[None])
        wanted = own_detections(model, image)
        count = len(wanted["scores"])
        scores.append(output.class_logits[0, :count].sigmoid().amax(-1))
        assert torch.allclose(scores[-1], wanted["scores"], rtol=0, atol=2**-22)
        overwrite_eps(model, 0.0)
    assert not torch.equal(*scores)
    published = f"https://x.org/m-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    enum = SimpleNamespace(COCO_V1=SimpleNamespace(url=published))
    monkeypatch.setattr(loading, "get_model_weights", lambda _: enum)
    for name in ("auto", FASTER):
        spec = load_detector(name, str(path)).spec
        assert spec.settings["frozen_norm_epsilon"] == 0
    write_small(path, "fasterrcnn_resnet50_fpn", monkeypatch)
    with pytest.raises(DetectorError, match=f"norms that are not frozen; pass --detector {FASTER}"):
        load_detector(f"{FASTER}-eps0", str(path))


def test_names_of_torchvision_files_before_0_14(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published files have them."""
    path = tmp_path / "m.pth"
    write_small(path, "fasterrcnn_resnet50_fpn", monkeypatch)
    new = load_detector("auto", str(path))
    weights = torch.load(path, weights_only=True)
    old = {
        k.replace("_blocks.", "_blocks#").replace(".0.weight", ".weight").replace("#", ".")
        if "fpn." in k and k.endswith("weight")
        else k.replace(".0.bias", ".bias")
        if "fpn." in k
        else k.replace("rpn.head.conv.0.0", "rpn.head.conv"): v
        for k, v in weights.items()
    }
    assert old.keys() != weights.keys()
    torch.save({"model": old, "optimizer": {}, "epoch": 3}, path)
    assert load_detector("auto", str(path)).spec == new.spec


def test_names_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pth"
    for name, all_outputs in ((FASTER, ("cat", "dog")), (RETINA, ("LABEL_0", "cat", "dog"))):
        write_small(path, name.removeprefix("torchvision:"), monkeypatch)
        placeholders = load_detector(name, str(path)).spec.label_names
        assert placeholders == tuple(f"LABEL_{i}" for i in range(len(all_outputs)))
        for given in (("cat", "dog"), ("background", "cat", "dog")):
            spec = load_detector(name, str(path), DetectorOptions(labels=given)).spec
            assert spec.label_names[-2:] == all_outputs[-2:]
            again = options_of(detector_identity(spec))
            assert load_detector(name, str(path), again).spec == spec
        with pytest.raises(DetectorError, match="has 1 names and .* has 3 class outputs"):
            load_detector(name, str(path), DetectorOptions(labels=("cat",)))
        weights = torch.load(path, weights_only=True)
        torch.save({"model": weights, "class_names": ["cat", "dog"]}, path)
        assert load_detector(name, str(path)).spec.label_names == all_outputs
    torch.save(small_model("fasterrcnn", 91).state_dict(), path)
    names = load_detector(FASTER, str(path)).spec.label_names
    assert len(names) == 90
    assert all(names[i - 1] == name for i, name in COCO_NAMES.items())


def test_options_and_files_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pth"
    write_small(path, "fasterrcnn_resnet50_fpn", monkeypatch)
    few = load_detector(FASTER, str(path), DetectorOptions(num_queries=3))
    output = few.forward(few.preprocess(picture(PICTURES[0]))[None])
    assert output.queries.shape == (1, 3, 64)
    with pytest.raises(DetectorError, match="--encoder-layer: .* has a feature pyramid"):
        load_detector(FASTER, str(path), DetectorOptions(encoder_layer=3))
    with pytest.raises(DetectorError, match=f"no state dict of RetinaNet; it can be {FASTER}"):
        load_detector(RETINA, str(path))
    with pytest.raises(DetectorError, match=f"unknown detector .*did you mean '{RETINA}'"):
        load_detector("torchvision:retinanet_resnet50_fpm", str(path))
    with pytest.raises(DetectorError, match="needs --weights: a state dict"):
        load_detector(FASTER)
    with pytest.raises(ValueError, match="cannot respect padding"):
        few.forward(torch.zeros(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.bool))
    weights = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in weights.items() if "fc7.bias" not in k}, path)
    with pytest.raises(DetectorError, match=r"missing tensors: roi_heads.box_head.fc7.bias"):
        load_detector(FASTER, str(path))
    torch.save(weights | {"roi_heads.box_head.fc7.bias": torch.ones(3)}, path)
    with pytest.raises(DetectorError, match=r"size mismatch for roi_heads.box_head.fc7.bias"):
        load_detector(FASTER, str(path))


def test_sizes_and_threshold_of_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchvision's builders take them; a head's or cache's detector has them again."""
    path = str(tmp_path / "m.pth")
    write_small(tmp_path / "m.pth", "fcos_resnet50_fpn", monkeypatch)
    options = DetectorOptions(input_size=(64, 128), score_threshold=0.02)
    detector = load_detector(FCOS, path, options)
    model = small_model("fcos_resnet50_fpn", min_size=64, max_size=128)
    model.score_thresh = 0.02
    image = picture(PICTURES[0])
    wanted = own_detections(model, image)
    found = detector.forward(detector.preprocess(image)[None]).class_logits[0].max(-1).values
    there = found[found > ABSENT_LOGIT]
    assert len(there) == len(wanted["scores"]) > 0
    assert torch.allclose(there.sigmoid(), wanted["scores"], rtol=0, atol=2**-22)
    again = load_with_options_of(detector_identity(detector.spec), path)
    assert again.spec == detector.spec != load_detector(FCOS, path).spec


def test_input_sizes_are_those_of_torchs_resize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small(tmp_path / "m.pth", "fcos_resnet50_fpn", monkeypatch)
    detector: Any = load_detector(FCOS, str(tmp_path / "m.pth"))
    random = np.random.default_rng(0)
    for height, width in random.integers(20, 3000, (50, 2)).tolist():
        resized = detector._transform.resize(torch.empty(3, height, width, device="meta"))[0]
        assert detector.input_geometry((height, width)).input_hw == tuple(resized.shape[1:])
