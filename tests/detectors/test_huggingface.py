import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.protocol import Detector, TunableDetector
from mfdetr_cache.detectors.registry import list_detectors, load_detector
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.evaluation.detections import class_probabilities
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from tests.support import detectors


def save_two_stage(folder: Path) -> None:
    detectors.save_deformable_detr(folder, two_stage=True)


SINGLE_LEVEL = [("c1", 4), ("backbone8", 8), ("encoder32", 32)]
FAMILIES: list[tuple[str, Callable[[Path], None], list[tuple[str, int]]]] = [
    (
        "rt_detr",
        detectors.save_rtdetr,
        [("c1", 4), ("encoder8", 8), ("encoder16", 16), ("encoder32", 32)],
    ),
    (
        "rt_detr_v2",
        detectors.save_rtdetr_v2,
        [("c1", 4), ("encoder8", 8), ("encoder16", 16), ("encoder32", 32)],
    ),
    (
        "d_fine",
        detectors.save_dfine,
        [("c1", 4), ("encoder8", 8), ("encoder16", 16), ("encoder32", 32)],
    ),
    (
        "deimv2",
        detectors.save_deimv2,
        [("c1", 4), ("encoder8", 8), ("encoder16", 16), ("encoder32", 32)],
    ),
    (
        "deformable_detr",
        detectors.save_deformable_detr,
        [("c1", 4), ("encoder8", 8), ("encoder16", 16), ("encoder32", 32), ("encoder64", 64)],
    ),
    (
        "deformable_detr",
        save_two_stage,
        [("c1", 4), ("encoder8", 8), ("encoder16", 16), ("encoder32", 32), ("encoder64", 64)],
    ),
    ("detr", detectors.save_detr, SINGLE_LEVEL),
    ("conditional_detr", detectors.save_conditional_detr, SINGLE_LEVEL),
    ("dab-detr", detectors.save_dab_detr, SINGLE_LEVEL),
    ("lw_detr", detectors.save_lw_detr, [("encoder16", 16)]),
    ("rf_detr", detectors.save_rf_detr, [("encoder16", 16)]),
]


@pytest.mark.parametrize(
    ("model_type", "save", "maps"), FAMILIES, ids=lambda v: getattr(v, "__name__", None)
)
def test_every_family_keeps_the_protocol(
    tmp_path: Path, model_type: str, save: Callable[[Path], None], maps: list[tuple[str, int]]
) -> None:
    save(tmp_path)
    detector = load_detector("hf", str(tmp_path))
    assert isinstance(detector, Detector)
    spec = detector.spec
    assert spec.name == f"hf:{model_type}"
    assert [(m.name, m.stride) for m in spec.maps] == maps
    nothing = ("no object",) if spec.score_function == "softmax" else ()
    assert spec.label_names == ("ellipse", "box", "other", *nothing)
    image = Image.effect_noise((130, 90), 60).convert("RGB")
    pixels = detector.preprocess(image)
    geometry = detector.input_geometry((90, 130))
    assert pixels.shape[1:] == geometry.input_hw
    output = detector.forward(pixels[None])
    assert output.class_logits.shape == (1, spec.num_queries, len(spec.label_names))
    assert output.queries.shape == (1, spec.num_queries, spec.query_dim)
    assert output.boxes_cxcywh_norm.min() >= 0
    for m in spec.maps:
        _, channels, height, width = output.maps[m.name].shape
        assert channels == m.channels
        assert height == -(-geometry.input_hw[0] // m.stride)
        assert width == -(-geometry.input_hw[1] // m.stride)
    # The same image again gives the same numbers, and its neighbours do not matter.
    other = detector.preprocess(Image.effect_noise((130, 90), 20).convert("RGB"))
    both = detector.forward(torch.stack((pixels, other)))
    assert torch.equal(detector.forward(pixels[None]).class_logits, output.class_logits)
    assert torch.allclose(both.class_logits[:1], output.class_logits, atol=1e-4)
    # What the heads see is what is kept: the class head applied to the queries gives the logits.
    assert not any(p.requires_grad for p in detector.parameters())  # type: ignore[attr-defined]


def test_encoder_maps_are_those_of_the_chosen_layer(tmp_path: Path) -> None:
    detectors.save_deformable_detr(tmp_path)
    pixels = torch.rand(1, 3, 96, 128)
    from transformers import DeformableDetrForObjectDetection

    model = DeformableDetrForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).encoder_hidden_states
    for layer in (2, 4, 5):
        detector = load_detector("hf", str(tmp_path), DetectorOptions(encoder_layer=layer))
        assert detector.spec.settings["encoder_layer"] == layer
        maps = detector.forward(pixels).maps
        tokens = torch.cat(
            [maps[f"encoder{s}"].flatten(2).transpose(1, 2) for s in (8, 16, 32, 64)], 1
        )
        assert torch.equal(tokens, states[layer])
    assert load_detector("hf", str(tmp_path)).spec.settings["encoder_layer"] == 4
    with pytest.raises(DetectorError, match="--encoder-layer 6: Deformable DETR has 1 to 5"):
        load_detector("hf", str(tmp_path), DetectorOptions(encoder_layer=6))
    detectors.save_rtdetr(tmp_path / "pyramid")
    with pytest.raises(
        DetectorError, match="--encoder-layer 1: the encoder of RT-DETR is no stack"
    ):
        load_detector("hf", str(tmp_path / "pyramid"), DetectorOptions(encoder_layer=1))


def test_level_embedding_is_the_detectors(tmp_path: Path) -> None:
    detectors.save_deformable_detr(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embed = load_detector("hf", str(tmp_path)).spec.encoder_level_embed
    assert embed is not None
    assert torch.equal(torch.tensor(embed), weights["model.level_embed"])


def test_hash_is_of_the_weights_and_not_of_the_file(tmp_path: Path, rtdetr_folder: Path) -> None:
    before = load_detector("hf", str(rtdetr_folder)).spec.weights_sha256
    copy = tmp_path / "copy"
    shutil.copytree(rtdetr_folder, copy)
    weights = load_file(copy / "model.safetensors")
    save_file(
        dict(reversed(weights.items())), copy / "model.safetensors", {"format": "pt", "x": "y"}
    )
    assert load_detector("hf", str(copy)).spec.weights_sha256 == before
    name = next(k for k, v in weights.items() if v.dtype == torch.float32)
    weights[name].flatten()[0] += 1e-3
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert load_detector("hf", str(copy)).spec.weights_sha256 != before


def test_missing_weights_are_named(tmp_path: Path, rtdetr_folder: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(rtdetr_folder, copy)
    weights = load_file(copy / "model.safetensors")
    gone = [k for k in weights if "enc_score_head" in k]
    save_file(
        {k: v for k, v in weights.items() if k not in gone},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(DetectorError, match=r"missing keys in its weights: .*enc_score_head"):
        load_detector("hf", str(copy))


def test_damaged_weights_and_other_models_are_named(tmp_path: Path, rtdetr_folder: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(rtdetr_folder, copy)
    (copy / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(DetectorError, match="cannot load the detector"):
        load_detector("hf", str(copy))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(DetectorError, match="model type 'bert' has no adapter"):
        load_detector("hf", str(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(DetectorError, match="cannot load the detector"):
        load_detector("hf", str(copy))
    with pytest.raises(DetectorError, match="needs --weights"):
        load_detector("hf")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backbone": "owner/name", "backbone_config": None}, "backbone 'owner/name'"),
        ({"backbone_config": {"backbone": "hf-hub:owner"}}, "backbone 'hf-hub:owner'"),
        ({"backbone_kwargs": {"trust_remote_code": True}}, "trust_remote_code 'True'"),
    ],
)
def test_no_other_repository_is_asked(
    tmp_path: Path, rtdetr_folder: Path, change: dict[str, object], named: str
) -> None:
    """transformers would fetch a backbone by its name, and run its code where it is told to."""
    shutil.copytree(rtdetr_folder, tmp_path / "d")
    path = tmp_path / "d/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DetectorError, match=f"its config.json has {named}, which is in no"):
        load_detector("hf", str(tmp_path / "d"))


def test_a_detector_computes_exact_float32(rtdetr_folder: Path) -> None:
    """Whatever was chosen before; every process that computes one loads it in the same way."""
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    load_detector("hf", str(rtdetr_folder))
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_every_family_is_listed() -> None:
    listed = list_detectors()
    assert {d.model for d in listed if d.name == "hf"} == {
        "DEIMv2",
        "RT-DETR",
        "RT-DETRv2",
        "D-FINE",
        "Deformable DETR",
        "DETR",
        "Conditional DETR",
        "DAB-DETR",
        "Grounding DINO",
        "MM-Grounding-DINO",
        "LW-DETR",
        "RF-DETR",
    }
    assert all(d.checked for d in listed)


def test_one_level_encoders_give_the_chosen_layer(tmp_path: Path) -> None:
    """The last layer is what transformers returns as the encoder's output."""
    detectors.save_conditional_detr(tmp_path)
    last = load_detector("hf", str(tmp_path), DetectorOptions(encoder_layer=5))
    fourth = load_detector("hf", str(tmp_path))
    assert fourth.spec.settings["encoder_layer"] == 4
    pixels = last.preprocess(Image.effect_noise((130, 90), 60).convert("RGB"))[None]
    model = last.model  # type: ignore[attr-defined]
    whole = model.model(pixels, pixel_mask=torch.ones_like(pixels[:, 0], dtype=torch.long))
    found = last.forward(pixels).maps["encoder32"]
    encoded = model.model.encoder
    kept: list[torch.Tensor] = []
    encoded.register_forward_hook(lambda _m, _a, output: kept.append(output[0]))
    last.forward(pixels)
    assert torch.equal(found.flatten(2).transpose(1, 2), kept[0])
    assert not torch.equal(found, fourth.forward(pixels).maps["encoder32"])
    assert torch.equal(whole.last_hidden_state, last.forward(pixels).queries)


def test_a_softmax_detector_never_finds_nothing(tmp_path: Path) -> None:
    """DETR's last class is no object: it takes probability and is no label."""
    detectors.save_detr(tmp_path)
    detector = load_detector("hf", str(tmp_path))
    pixels = detector.preprocess(Image.effect_noise((130, 90), 60).convert("RGB"))[None]
    logits = detector.forward(pixels).class_logits
    scores = class_probabilities(logits, detector.spec)
    assert scores.shape[-1] == len(detector.spec.label_names) - 1
    assert (scores.sum(-1) < 1).all()


def test_a_patch_of_14_pixels_is_a_stride_of_14(tmp_path: Path) -> None:
    detectors.save_rf_detr(tmp_path, patch=14, side=112)
    detector = load_detector("hf", str(tmp_path))
    (only,) = detector.spec.maps
    assert (only.name, only.stride) == ("encoder14", 14)
    head = build_head(HeadConfig(hidden_dim=16, roi_size=8), detector.spec)
    assert head.align.stride == 14
    assert head.c1 is None


@pytest.mark.parametrize("save", [f[1] for f in FAMILIES], ids=[f[1].__name__ for f in FAMILIES])
def test_tuned_weights_are_saved_so_that_they_come_back(
    tmp_path: Path, save: Callable[[Path], None]
) -> None:
    """All weights are changed a little; the saved detector is that one, bit for bit."""
    save(tmp_path / "before")
    detector = load_detector("hf", str(tmp_path / "before"))
    assert isinstance(detector, TunableDetector)
    everything = detector.tunable_parameters("all")
    rest = detector.tunable_parameters("encoder-decoder")
    assert 0 < len(rest) < len(everything)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in everything:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    weights = detector.save_weights(tmp_path / "after")
    again = load_detector("hf", weights)
    pixels = detector.preprocess(Image.effect_noise((130, 90), 60).convert("RGB"))[None]
    before, after = detector.forward(pixels), again.forward(pixels)
    assert torch.equal(before.class_logits, after.class_logits)
    assert torch.equal(before.boxes_cxcywh_norm, after.boxes_cxcywh_norm)
    assert all(torch.equal(before.maps[n], after.maps[n]) for n in before.maps)


def test_the_layout_of_the_weight_file_does_not_matter(tmp_path: Path) -> None:
    """Equal weights behind headers of different lengths, so that they begin at other addresses."""
    found = []
    for note in ("", "x", "xxxxxxxxx"):
        folder = tmp_path / f"folder{note}"
        detectors.save_deformable_detr(folder)
        file = folder / "model.safetensors"
        save_file(load_file(file), file, {"format": "pt", "note": note})
        detector = load_detector("hf", str(folder))
        found.append(detector.forward(torch.linspace(0, 1, 3 * 96 * 128).reshape(1, 3, 96, 128)))
    for other in found[1:]:
        assert torch.equal(found[0].class_logits, other.class_logits)
        assert all(torch.equal(found[0].maps[n], other.maps[n]) for n in other.maps)


@pytest.mark.parametrize("save", [f[1] for f in FAMILIES], ids=[f[1].__name__ for f in FAMILIES])
def test_gradients_flow_into_what_is_tuned_only(
    tmp_path: Path, save: Callable[[Path], None]
) -> None:
    save(tmp_path)
    detector = load_detector("hf", str(tmp_path))
    assert isinstance(detector, TunableDetector)
    pixels = detector.preprocess(Image.effect_noise((130, 90), 60).convert("RGB"))[None]
    assert not detector.forward(pixels).queries.requires_grad
    for parameter in detector.tunable_parameters("encoder-decoder"):
        parameter.requires_grad_(True)
    output = detector.forward(pixels)
    assert output.queries.requires_grad
    for spec in detector.spec.maps:
        assert output.maps[spec.name].requires_grad == (spec.role == "encoder")


def test_no_code_of_a_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for an unknown model type nor beside a known one, whatever standard input says."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n"
    unknown, known = tmp_path / "unknown", tmp_path / "known"
    detectors.save_rtdetr(known)
    unknown.mkdir()
    for folder in (unknown, known):
        (folder / "evil.py").write_text(code)
    remote = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (unknown / "config.json").write_text(json.dumps(remote))
    with pytest.raises(DetectorError, match="model type 'evil' has no adapter"):
        load_detector("hf", str(unknown))
    processor = known / "preprocessor_config.json"
    settings = json.loads(processor.read_text())
    remote = {"auto_map": {"AutoImageProcessor": "evil.Evil"}}
    processor.write_text(json.dumps(settings | remote))
    plain = load_detector("auto", str(known))
    assert plain.spec.name == "hf:rt_detr"
    assert not marker.exists()
