"""Official checkpoints: loading, refusing, and agreement with transformers' own classes.

Their numbers are checked in tests/real/test_official_goldens.py.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

from mfdetr_cache.detectors.conformance import DetectorConformance
from mfdetr_cache.detectors.official.architecture import Architecture
from mfdetr_cache.detectors.official.backbones import BackboneArchitecture
from mfdetr_cache.detectors.official.detr import OfficialDetr
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import list_detectors, load_detector, load_with_options_of
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.identity import detector_identity
from tests.support import detectors
from tests.support.official import SMALL, write_checkpoint


class TestOfficialConformance(DetectorConformance):
    name: str
    path: Path

    @pytest.fixture(autouse=True, scope="class", params=list(SMALL))
    @classmethod
    def _weights(
        cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.mktemp("official") / "checkpoint.pth"
        cls.name, cls.path = request.param, path
        write_checkpoint(path, SMALL[request.param])

    def make_detector(self) -> Detector:
        return load_detector(self.name, str(self.path))


class TestHuggingFaceConformance(DetectorConformance):
    folder: Path

    @pytest.fixture(
        autouse=True,
        scope="class",
        params=[
            "rtdetr",
            "rtdetr_v2",
            "dfine",
            "deimv2",
            "deformable_detr",
            "detr",
            "conditional_detr",
            "dab_detr",
            "lw_detr",
            "rf_detr",
        ],
    )
    @classmethod
    def _folder(
        cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        cls.folder = tmp_path_factory.mktemp(request.param)
        getattr(detectors, f"save_{request.param}")(cls.folder)

    def make_detector(self) -> Detector:
        return load_detector("hf", str(self.folder))


@pytest.mark.parametrize("name", list(SMALL))
def test_the_architecture_is_read_off_the_shapes(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "c.pth", SMALL[name])
    detector: Any = load_detector(name, str(tmp_path / "c.pth"))
    assert detector.model.architecture == SMALL[name]


def test_containers_of_every_kind_give_the_same_detector(tmp_path: Path) -> None:
    document = write_checkpoint(tmp_path / "a.pth", SMALL["dino"])
    weights = document["model"]
    torch.save(weights, tmp_path / "bare.pth")
    torch.save({"state_dict": weights}, tmp_path / "lightning.pth")
    torch.save({"model": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "ddp.pth")
    torch.save(document, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"ema": {"module": weights}, "model": {}}, tmp_path / "ema.pth")
    for place, prefix in enumerate(("", "module.", "model._orig_mod.", "module.model.")):
        wrapped = {prefix + k: v.clone() for k, v in weights.items()}
        save_file(wrapped, tmp_path / f"{place}.safetensors")
    hashes = {load_detector("dino", str(file)).spec.weights_sha256 for file in tmp_path.iterdir()}
    assert len(hashes) == 1


def test_arguments_in_the_file_say_what_no_tensor_does(tmp_path: Path) -> None:
    """As IDEA-Research/DINO and HDETR/H-Deformable-DETR use them at test time."""

    def load(name: str, **arguments: object) -> Any:
        path = tmp_path / "checkpoint.pth"
        document = write_checkpoint(path, SMALL[name])
        torch.save({**document, "args": argparse.Namespace(**arguments)}, path)
        return load_detector(name, str(path))

    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    plain = load("dino", pe_temperatureH=20, pe_temperatureW=20, nheads=8)
    assert plain.spec.settings == load("dino").spec.settings
    warm = load("dino", pe_temperatureH=10000, pe_temperatureW=10000)
    assert warm.spec.settings["temperature"] == 10000
    assert not torch.equal(warm.forward(pixels).class_logits, plain.forward(pixels).class_logits)
    again = load_detector("dino", warm.save_weights(tmp_path / "saved"))
    assert again.spec == warm.spec
    sizes = {"data_aug_scales": [480, 640], "data_aug_max_size": 1000}
    assert load("dino", **sizes).input_geometry((480, 600)).resized_hw == (640, 800)
    larger = load("dino", data_aug_scale_overlap=1.5)
    assert larger.input_geometry((480, 640)).resized_hw == (1200, 1600)
    assert load("h-detr-swin-t", num_queries_one2one=7, num_queries=300).spec.num_queries == 7
    with pytest.raises(DetectorError, match=r"was trained with dilation=True, which is not read"):
        load("dino", dilation=True)
    with pytest.raises(DetectorError, match="pe_temperatureH and W differ"):
        load("dino", pe_temperatureH=20, pe_temperatureW=10)
    damaged = {"data_aug_scales": ["a"], "data_aug_max_size": float("inf"), "num_queries": "many"}
    for name, value in damaged.items():
        with pytest.raises(DetectorError, match="its arguments are damaged"):
            load("dino", **{name: value})


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this ran",)


def test_a_checkpoint_that_asks_for_code_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = write_checkpoint(tmp_path / "c.pth", SMALL["dino"])
    torch.save({**document, "args": argparse.Namespace(hook=_Evil())}, tmp_path / "c.pth")
    with pytest.raises(DetectorError, match=r"asks for \S*print to be run while loading, which is"):
        load_detector("dino", str(tmp_path / "c.pth"))
    assert "this ran" not in capsys.readouterr().out


def test_names_and_input_size_of_a_tuned_checkpoint(tmp_path: Path) -> None:
    """Names of the file, or the user's; a cache's detector has them again."""
    labels = tuple(f"kind {i}" for i in range(SMALL["dino"].num_labels))
    document = write_checkpoint(tmp_path / "c.pth", SMALL["dino"])
    path = str(tmp_path / "c.pth")
    assert load_detector("dino", path).spec.label_names[0] == "LABEL_0"
    options = DetectorOptions(labels=labels, input_size=(320, 480))
    named = load_detector("dino", path, options)
    assert named.spec.label_names == labels
    assert named.input_geometry((100, 120)).input_hw == (320, 384)
    assert named.input_geometry((100, 300)).input_hw == (160, 480)
    assert load_with_options_of(detector_identity(named.spec), path).spec == named.spec
    with pytest.raises(DetectorError, match="--labels has 2 names and dino has"):
        load_detector("dino", path, DetectorOptions(labels=labels[:2]))
    with pytest.raises(DetectorError, match="--input-size 800x600: .* SHORTERxLONGER"):
        load_detector("dino", path, DetectorOptions(input_size=(800, 600)))
    document["args"] = argparse.Namespace(class_names=list(labels))
    torch.save(document, path)
    assert load_detector("dino", path).spec.label_names == labels


def damaged(tmp_path: Path, change: Any) -> str:
    document = write_checkpoint(tmp_path / "c.pth", SMALL["dino"])
    change(document["model"])
    torch.save(document, tmp_path / "c.pth")
    return str(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("transformer.tgt_embed.weight"), "holds deformable-detr with .*not dino"),
        (lambda m: m.pop("class_embed.1.bias"), "missing tensors: class_embed.1.bias"),
        (
            lambda m: m.update(extra=torch.zeros(1)),
            "unexpected tensors: extra; the result",
        ),
        (
            lambda m: m.update({"label_enc.weight": torch.zeros(3, 256)}),
            r"label_enc\.weight is \(3, 256\), expected \(7, 256\)",
        ),
        (
            lambda m: m.update({"class_embed.1.bias": torch.ones(6)}),
            "are shared in this detector, but differ here",
        ),
        (lambda m: m.pop("transformer.level_embed"), "is no checkpoint of .* has no transformer.l"),
        (lambda m: m.update(extra=3), "is no state dict of a detector: extra in it"),
    ],
)
def test_keys_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    path = damaged(tmp_path, change)
    with pytest.raises(DetectorError, match=message):
        load_detector("dino", path)


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(DetectorError, match=r"absent\.pth does not exist; check --weights"):
        load_detector("dino", str(tmp_path / "absent.pth"))
    with pytest.raises(DetectorError, match="is a folder; this detector takes a checkpoint file"):
        load_detector("dino", str(tmp_path))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(DetectorError, match=r"text\.pth (cannot be read|is damaged)"):
        load_detector("dino", str(tmp_path / "text.pth"))
    write_checkpoint(tmp_path / "cut.pth", SMALL["dino"])
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DetectorError, match=r"cut\.pth (cannot be read|is damaged)"):
        load_detector("dino", str(tmp_path / "cut.pth"))
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(DetectorError, match="epoch in it is no tensor"):
        load_detector("dino", str(tmp_path / "empty.pth"))


def test_another_detectors_checkpoint_is_refused_with_the_right_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c.pth", SMALL["dino"])
    with pytest.raises(DetectorError, match="holds dino with FocalNet .* pass --detector dino"):
        load_detector("h-detr-r50", str(tmp_path / "c.pth"))
    with pytest.raises(DetectorError, match="holds dino with FocalNet"):
        load_detector("dino-r50", str(tmp_path / "c.pth"))


def test_options_are_checked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c.pth", SMALL["dino"])
    path = str(tmp_path / "c.pth")
    with pytest.raises(DetectorError, match="--encoder-layer 7: dino has 1 to 2"):
        load_detector("dino", path, DetectorOptions(encoder_layer=7))
    with pytest.raises(DetectorError, match="--num-queries 13: dino has 1 to 12"):
        load_detector("dino", path, DetectorOptions(num_queries=13))
    with pytest.raises(DetectorError, match="unknown detector 'dino-r5'; did you mean 'dino-r50'"):
        load_detector("dino-r5", path)
    fewer = load_detector("dino", path, DetectorOptions(num_queries=5, encoder_layer=1))
    output = fewer.forward(torch.randn(1, 3, 64, 96))
    assert output.queries.shape == (1, 5, 256)
    assert fewer.spec.settings["encoder_layer"] == 1
    with pytest.raises(
        DetectorError, match="16 x 16 pixels has fewer cells .* larger --input-size"
    ):
        load_detector("dino", path).forward(torch.randn(1, 3, 16, 16))


def test_weights_may_be_left_out_to_look_at_a_detector() -> None:
    detector = load_detector("h-detr-r50")
    assert detector.spec.num_queries == 300
    assert sum(p.numel() for p in detector.model.parameters()) > 40e6  # type: ignore[attr-defined]
    with pytest.raises(DetectorError, match="--detector dino needs --weights"):
        load_detector("dino")


def test_every_official_name_is_listed() -> None:
    names = {d.name for d in list_detectors()}
    wanted = {"h-detr-r50", "h-detr-swin-t", "h-detr-swin-l", "dino-r50", "dino-swin-l"}
    assert wanted | {"dino-focalnet-l", "deformable-detr-r50", "hf"} <= names


def official_key(key: str) -> str:
    """The official name of a parameter of transformers' Deformable DETR with its own ResNet."""
    rules = [
        (r"^model\.backbone\.model\.embedder\.embedder\.convolution", "backbone.0.body.conv1"),
        (r"^model\.backbone\.model\.embedder\.embedder\.normalization", "backbone.0.body.bn1"),
        (
            r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.",
            lambda m: f"backbone.0.body.layer{int(m[1]) + 1}.{m[2]}.",
        ),
        (r"\.shortcut\.convolution", ".downsample.0"),
        (r"\.shortcut\.normalization", ".downsample.1"),
        (r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
        (r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
        (r"^model\.input_proj", "input_proj"),
        (r"^model\.query_position_embeddings", "query_embed"),
        (r"^model\.(encoder|decoder)", r"transformer.\1"),
        (r"^model\.", "transformer."),
        (r"(encoder\.layers\.\d\.)self_attn_layer_norm", r"\1norm1"),
        (r"(encoder\.layers\.\d\.)final_layer_norm", r"\1norm2"),
        (r"(decoder\.layers\.\d\.)self_attn_layer_norm", r"\1norm2"),
        (r"(decoder\.layers\.\d\.)encoder_attn_layer_norm", r"\1norm1"),
        (r"(decoder\.layers\.\d\.)final_layer_norm", r"\1norm3"),
        (r"\.encoder_attn\.", ".cross_attn."),
        (r"\.mlp\.fc1", ".linear1"),
        (r"\.mlp\.fc2", ".linear2"),
        (r"(decoder\.layers\.\d\.self_attn\.)o_proj", r"\1out_proj"),
    ]
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def convert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    converted = {official_key(k): v for k, v in weights.items() if "num_batches" not in k}
    for key in [k for k in converted if re.search(r"self_attn\.q_proj\.", k)]:
        prefix, kind = key.split("q_proj.")
        parts = [converted.pop(f"{prefix}{p}_proj.{kind}") for p in "qkv"]
        converted[f"{prefix}in_proj_{kind}"] = torch.cat(parts)
    return converted


@pytest.mark.parametrize(("two_stage", "refine"), [(False, False), (False, True), (True, True)])
def test_transformers_deformable_detr_computes_the_same(*, two_stage: bool, refine: bool) -> None:
    """Two implementations that share no code, plain and two-stage, padding included.

    Ours agrees with the official code (goldens), so this checks the family ``hf`` serves as well.
    """
    torch.manual_seed(0)
    config = DeformableDetrConfig(
        backbone_config=ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        use_timm_backbone=False,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=20,
        two_stage_num_proposals=20,
        two_stage=two_stage,
        with_box_refine=refine,
        num_labels=7,
    )
    theirs = DeformableDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "class_embed" in name or "bbox_embed" in name:
                parameter.normal_(std=0.1)
    backbone = BackboneArchitecture("resnet", (3, 4, 6, 3), 256)
    ours = OfficialDetr(
        Architecture(
            "deformable-detr",
            backbone,
            num_labels=7,
            num_queries=20,
            table_rows=0 if two_stage else 20,
            hidden=64,
            encoder_layers=2,
            decoder_layers=2,
            two_stage=two_stage,
            box_refine=refine,
        )
    ).eval()
    weights = convert(theirs.state_dict())
    expected = ours.state_dict()
    for key in expected.keys() - weights.keys():
        match = re.sub(r"^transformer\.decoder\.", "", key)
        weights[key] = weights[match]
    ours.load_state_dict({k: weights[k] for k in expected})
    pixels = torch.randn(2, 3, 96, 130)
    mask = torch.zeros(2, 96, 130, dtype=torch.bool)
    mask[1, 70:] = mask[1, :, 100:] = True
    pixels[mask[:, None].expand_as(pixels)] = 0
    with torch.no_grad():
        found = ours(pixels, mask)
        wanted = theirs(pixels, pixel_mask=(~mask).long())
    # float32 through two encoder and two decoder layers: the goldens show 7e-6 between
    # implementations after six.
    torch.testing.assert_close(found.class_logits, wanted.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.boxes_cxcywh_norm, wanted.pred_boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.queries, wanted.last_hidden_state, rtol=0, atol=1e-4)
