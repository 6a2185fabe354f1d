"""Detectors that look for the words they are told."""

from pathlib import Path

import pytest
import torch

from mfdetr_cache.detectors.conformance import DetectorConformance
from mfdetr_cache.detectors.options import DetectorOptions, options_of, phrases_of
from mfdetr_cache.detectors.protocol import Detector, TunableDetector
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.identity import detector_identity
from tests.support import detectors


@pytest.fixture(params=[False, True], ids=["grounding-dino", "mm-grounding-dino"])
def grounding_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    detectors.save_grounding_dino(tmp_path, mm=request.param)
    return tmp_path


PROMPT = ("ellipse", "traffic lights", "box")


class TestOpenVocabulary(DetectorConformance):
    """Grounding DINO and MM-Grounding-DINO keep the protocol for any prompt."""

    @pytest.fixture(autouse=True)
    def _folder(self, grounding_folder: Path) -> None:
        self.folder = grounding_folder

    def make_detector(self) -> Detector:
        return load_detector("hf", str(self.folder), DetectorOptions(prompt=PROMPT))


def test_a_phrase_has_the_mean_of_its_tokens(grounding_folder: Path) -> None:
    """Against the model itself with the caption as transformers' processor writes it."""
    from transformers import AutoModelForZeroShotObjectDetection, GroundingDinoProcessor

    detector = load_detector("hf", str(grounding_folder), DetectorOptions(prompt=PROMPT))
    processor = GroundingDinoProcessor.from_pretrained(grounding_folder)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(grounding_folder).eval()
    text = processor(text=list(PROMPT), return_tensors="pt")
    assert detector.spec.settings["token_ids"] == text["input_ids"][0].tolist()
    pixels = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        found = model(pixels, **text, output_hidden_states=True)
        backbone = model.model.backbone.conv_encoder.model
        stage = backbone(pixels, output_hidden_states=True).hidden_states[1]
    output = detector.forward(pixels)
    # [CLS] ellipse . traffic light ##s . box . [SEP]
    tokens = found.logits.sigmoid()
    wanted = [tokens[..., 1], tokens[..., 3:6].mean(-1), tokens[..., 7]]
    # A probability of two roundings, its logarithm and one sigmoid more.
    assert torch.allclose(output.class_logits.sigmoid(), torch.stack(wanted, -1), atol=1e-6)
    assert torch.equal(output.queries, found.last_hidden_state)
    assert torch.equal(output.boxes_cxcywh_norm, found.pred_boxes)
    encoder = [output.maps[f"encoder{s}"].flatten(2).transpose(1, 2) for s in (8, 16, 32, 64)]
    assert torch.equal(torch.cat(encoder, 1), found.encoder_vision_hidden_states[-1])
    assert torch.equal(output.maps["c1"], stage)


def test_a_prompt_is_part_of_the_identity(grounding_folder: Path) -> None:
    weights = str(grounding_folder)
    with pytest.raises(DetectorError, match="finds what it is told: give --prompt"):
        load_detector("auto", weights)
    given = load_detector("auto", weights, DetectorOptions(prompt=("tiger",)), PROMPT).spec
    assert given.label_names == ("tiger",)
    named = load_detector("auto", weights, None, ("traffic_lights", "St. Box")).spec
    assert named.label_names == ("traffic_lights", "St. Box")
    assert named.settings["token_ids"] == [101, 204, 205, 208, 1012, 100, 201, 1012, 102]
    assert load_detector("hf", weights, options_of(detector_identity(named))).spec == named
    for options, message in (
        (DetectorOptions(prompt=("box", " ? ")), "the class ' [?] ' has no word"),
        (DetectorOptions(prompt=("box",) * 128), "128 classes are 258 tokens, .* reads 256"),
        (DetectorOptions(prompt=("box",), labels=("box",)), "are those of --prompt"),
    ):
        with pytest.raises(DetectorError, match=message):
            load_detector("hf", weights, options)
    assert phrases_of("elephant. traffic light. ") == ("elephant", "traffic light")
    with pytest.raises(ValueError, match="names no class"):
        phrases_of(" . ")


def test_a_prompt_is_for_those_that_read_it(rtdetr_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DetectorError, match="--prompt: RT-DETR has its own classes"):
        load_detector("hf", str(rtdetr_folder), DetectorOptions(prompt=("box",)))
    with pytest.raises(DetectorError, match="--prompt: h-detr-r50 has its own classes"):
        load_detector("h-detr-r50", None, DetectorOptions(prompt=("box",)))
    detectors.save_grounding_dino(tmp_path / "before")
    detector = load_detector("hf", str(tmp_path / "before"), DetectorOptions(prompt=PROMPT))
    assert isinstance(detector, TunableDetector)
    again = load_detector(
        "hf", detector.save_weights(tmp_path / "after"), DetectorOptions(prompt=PROMPT)
    )
    assert again.spec == detector.spec
