"""Checkpoints of detrex and mmdetection; their numbers are in tests/real/test_layout_goldens.py."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.conformance import DetectorConformance
from mfdetr_cache.detectors.official.architecture import read_architecture
from mfdetr_cache.detectors.official.detr import OfficialDetr
from mfdetr_cache.detectors.official.layouts import read_source
from mfdetr_cache.detectors.preprocess import Preprocessing, opencv_bilinear
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.detectors.registry import load_detector, load_same_detector
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.identity import detector_identity
from tests.support.layouts import (
    CLASSES,
    FOLDER,
    config,
    detector_of,
    document,
    random_tensors,
)

# Of cv2 5.0.0.
EXPECTED_SMALLER = [
    [[44, 81, 119], [207, 20, 57], [177, 214, 27], [115, 152, 189]],
    [[60, 97, 134], [222, 35, 72], [192, 229, 42], [130, 167, 204]],
    [[74, 111, 149], [87, 50, 87], [207, 95, 57], [145, 182, 113]],
]
EXPECTED_LARGER = [
    [[0, 37, 74], [77, 114, 151], [154, 191, 228]],
    [[18, 55, 92], [95, 132, 169], [172, 209, 246]],
    [[36, 73, 110], [113, 150, 187], [190, 227, 8]],
]
# Width, blocks of the third stage, window, levels, queries, rows of the query table.
PUBLISHED = {
    "detrex/dino_swin_tiny_224_4scale_12ep": (96, 6, 7, 4, 900, 900),
    "detrex/dino_swin_small_224_4scale_12ep": (96, 18, 7, 4, 900, 900),
    "detrex/dino_swin_base_384_4scale_12ep": (128, 18, 12, 4, 900, 900),
    "detrex/dino_swin_large_224_4scale_12ep": (192, 18, 7, 4, 900, 900),
    "detrex/dino_swin_large_384_4scale_12ep": (192, 18, 12, 4, 900, 900),
    "detrex/dino_swin_large_384_5scale_12ep": (192, 18, 12, 5, 900, 900),
    "detrex/dino_convnext_tiny_384_4scale_12ep": (96, 9, 0, 4, 900, 900),
    "detrex/dino_convnext_small_384_4scale_12ep": (96, 27, 0, 4, 900, 900),
    "detrex/dino_convnext_base_384_4scale_12ep": (128, 27, 0, 4, 900, 900),
    "detrex/dino_convnext_large_384_4scale_12ep": (192, 27, 0, 4, 900, 900),
    "detrex/h_deformable_detr_swin_tiny_two_stage_12ep": (96, 6, 7, 4, 300, 1800),
    "detrex/h_deformable_detr_swin_large_two_stage_12ep": (192, 18, 7, 4, 300, 1800),
    "detrex/h_deformable_detr_swin_large_two_stage_12ep_900queries": (192, 18, 7, 4, 900, 2400),
    "mmdet/dino-5scale_swin-l_8xb2-12e_coco": (192, 18, 12, 5, 900, 900),
    "co-detr/co_dino_5scale_r50_1x_coco": (256, 6, 0, 5, 900, 900),
    "co-detr/co_dino_5scale_9encoder_lsj_r50_1x_coco": (256, 6, 0, 5, 900, 900),
    "co-detr/co_dino_5scale_swin_large_16e_o365tococo": (192, 18, 12, 5, 900, 900),
    "co-detr/co_deformable_detr_r50_1x_coco": (256, 6, 0, 4, 300, 300),
    "co-detr/co_deformable_detr_swin_tiny_1x_coco": (96, 6, 7, 4, 300, 300),
    "co-detr/co_deformable_detr_swin_small_1x_coco": (96, 18, 7, 4, 300, 300),
    "co-detr/co_deformable_detr_swin_base_3x_coco": (128, 18, 12, 4, 300, 300),
    "co-detr/co_deformable_detr_swin_large_900q_3x_coco": (192, 18, 12, 4, 900, 900),
}


def write(path: Path, name: str, change: tuple[str, str] = ("", "")) -> str:
    torch.save(document(name, random_tensors(name), change), path)
    return str(path)


class TestConformance(DetectorConformance):
    """The smallest of each code base, with a Swin of five levels."""

    @pytest.fixture(
        autouse=True,
        params=["detrex_dino_swin_5scale", "mmdet_dino_swin_5scale", "detrex_dino_convnext"],
    )
    def _one_layout(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.path = write(tmp_path / "c.pth", request.param)

    def make_detector(self) -> Detector:
        return load_detector("dino", self.path)


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items())
def test_names_and_shapes_of_published_sizes(name: str, expected: tuple[int, ...]) -> None:
    """Of models that their own code built from its own configurations, without weights."""
    tables = json.loads(gzip.decompress((FOLDER / "published.json.gz").read_bytes()))
    tensors = {k: torch.rand(()).expand(shape) for k, shape in tables[name].items()}
    settings = {"cfg": config("mmdet_dino_swin_5scale")}
    source = read_source(Checkpoint(Path(name), tensors, settings=settings))
    found = read_architecture(source.tensors, name, source.layout, source.arithmetic)
    with torch.device("meta"):
        ours = OfficialDetr(found).state_dict()
    computed = {k for k in ours if k.endswith("relative_position_index")}
    theirs = {k: v.shape for k, v in source.tensors.items() if k not in computed}
    assert theirs == {k: v.shape for k, v in ours.items() if k not in computed}
    backbone = found.backbone
    if backbone.kind == "swin":
        assert backbone.heads == tuple(backbone.width // 32 << i for i in range(4))
    assert expected == (
        backbone.width,
        backbone.depths[2],
        backbone.window,
        found.num_levels,
        found.num_queries,
        found.table_rows,
    )


@pytest.mark.parametrize("name", ["detrex_h_detr", "mmdet_dino", "mmdet2_deformable_plain"])
def test_the_detector_may_be_left_out(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "c.pth", name)
    spec = load_detector("auto", path).spec
    assert spec == load_detector(detector_of(name), path).spec
    assert spec.settings["layout"] == {"d": "detrex", "m": "mmdetection"}[name[0]]
    assert spec.num_queries == 12
    assert spec.label_names == (CLASSES if name.startswith("mmdet") else spec.label_names)
    same = load_same_detector("auto", path, detector_identity(spec), "cache")
    assert same.spec == spec


def test_detrex_does_not_say_the_temperature_of_dino(tmp_path: Path) -> None:
    path = write(tmp_path / "c.pth", "detrex_dino_swin_5scale")
    with pytest.raises(DetectorError, match="can be dino or dino-t20: the file does not say which"):
        load_detector("auto", path)
    one, other = (load_detector(name, path) for name in ("dino", "dino-t20"))
    assert one.spec.weights_sha256 == other.spec.weights_sha256
    assert one.spec.settings["temperature"] == 10000
    assert other.spec.settings["temperature"] == 20
    same = load_same_detector("auto", path, detector_identity(other.spec), "cache")
    assert same.spec == other.spec
    with pytest.raises(DetectorError, match="holds deformable-detr .*pass --detector deformable-d"):
        load_detector("dino", write(tmp_path / "d.pth", "detrex_deformable_refine"))
    with pytest.raises(DetectorError, match="says its position encoding; pass --detector dino"):
        load_detector("dino-t20", write(tmp_path / "m.pth", "mmdet_dino_swin_5scale"))


def test_two_dinos_of_mmdetection_differ_in_their_configuration_alone(tmp_path: Path) -> None:
    name = "mmdet_dino_swin_5scale"
    encoding = ("offset=0.0, temperature=20", "offset=-0.5, temperature=10000")
    plain, improved = (
        load_detector("dino", write(tmp_path / "c.pth", name, change)).spec
        for change in (("", ""), encoding)
    )
    assert plain.weights_sha256 == improved.weights_sha256
    assert (plain.settings["temperature"], plain.settings["offset"]) == (20, 0)
    assert (improved.settings["temperature"], improved.settings["offset"]) == (10000, 0.5)
    size = ("scale=(1333, 800)", "scale=(640, 1024)")
    detector = load_detector("dino", write(tmp_path / "c.pth", name, size))
    assert detector.input_geometry((480, 640)).input_hw == (640, 853)
    assert detector.spec.preprocessing["resize"] == "mmcv"
    fixed = ("keep_ratio=True, scale=(1333, 800)", "keep_ratio=False, scale=(640, 512)")
    detector = load_detector("dino", write(tmp_path / "c.pth", name, fixed))
    assert detector.input_geometry((480, 640)).input_hw == (512, 640)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("bgr_to_rgb=True", "bgr_to_rgb=False"), "data_preprocessor.bgr_to_rgb = False is not re"),
        (("pad_size_divisor=1", "pad_value=9"), "pad_value = 9 is not read"),
        (("type='SwinT", "style='caffe', type='SwinT"), "backbone.style = caffe is not read"),
        (
            ("type='SwinT", "type='mmpretrain.ConvNeXt', t='"),
            "backbone.type = ConvNeXt is not read",
        ),
        (("qk_scale=None", "qk_scale=0.2"), "backbone.qk_scale = 0.2 is not read"),
        (("act_cfg=None, ", ""), "neck.act_cfg = ReLU is not read"),
        (("num_heads=8", "num_heads=4"), "decoder.layer_cfg.self_attn_cfg.num_heads = 4 is not re"),
        (("ffn_drop=0.0", "act_cfg=dict(type='GELU')"), "ffn_cfg.act_cfg.type = GELU is not read"),
        (("dict(keep_r", "dict(prob=1.0, type='RandomFlip'), dict(keep_r"), "step = RandomFlip is"),
        (("type='DINO'", "type='DDQDETR'"), "model.type = DDQDETR is not read; DINO, Def"),
        (("positional_encoding", "other"), r"is not that of a DINO, .*'positional_encoding'"),
        (("model = dict(", "model = dict(("), r"its configuration \(meta.cfg\) cannot be read"),
    ],
)
def test_configurations_that_are_not_followed(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(DetectorError, match=message):
        load_detector("auto", write(tmp_path / "c.pth", "mmdet_dino_swin_5scale", change))


class _Log:
    """As mmengine's HistoryBuffer, which keeps its own methods by name."""

    def __init__(self) -> None:
        self.methods = [self.__reduce__, np.ones(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("size_divisor=1", "size_divisor=32, pad_val=9"), "step = Pad after Normalize is not"),
        (("dict(type='RandomFlip')", "dict(type='Pad', size_divisor=8)"), "step = Pad is not read"),
        (("to_rgb=True", "to_rgb=False"), "bgr_to_rgb = False is not read"),
        (("flip=False", "flip=True"), "step = RandomFlip is not read"),
        (("num_heads=8", "num_heads=4"), "decoder.layer_cfg.self_attn_cfg.num_heads = 4 is not re"),
        (
            ("('self_attn', 'norm', 'ffn'", "('norm', 'self_attn', 'ffn'"),
            r"operation_order = \['no",
        ),
        (("DeformableDetrTransformer", "OtherTransformer"), "= OtherTransformer is not read"),
        (("MultiScaleFlipAug", "Compose"), r"not that of a DINO, .* mmdetection \('MultiScaleF"),
    ],
)
def test_configurations_of_version_2_that_are_not_followed(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(DetectorError, match=message):
        load_detector("auto", write(tmp_path / "c.pth", "mmdet2_deformable_two_stage", change))


def test_averaged_weights_of_version_2_are_under_the_own_names(tmp_path: Path) -> None:
    """Its EMA hook keeps the others as buffers of the model."""
    name = "mmdet2_deformable_plain"
    whole = document(name, random_tensors(name))
    expected = load_detector("auto", write(tmp_path / "c.pth", name)).spec
    whole["state_dict"]["ema_backbone_conv1_weight"] = torch.ones(64, 3, 7, 7)
    torch.save(whole, tmp_path / "e.pth")
    assert load_detector("auto", str(tmp_path / "e.pth")).spec == expected
    assert (expected.num_queries, expected.settings["offset"]) == (12, 0.5)
    kept = load_detector("auto", write(tmp_path / "c.pth", name, ("keep_ratio=True", "a=1")))
    assert kept.input_geometry((480, 640)).input_hw == (800, 1067)


def test_a_file_that_a_training_wrote(tmp_path: Path) -> None:
    whole = document("mmdet_dino_swin_5scale", random_tensors("mmdet_dino_swin_5scale"))
    whole["message_hub"] = {"log_scalars": {"train/loss": _Log()}}
    whole["optimizer"] = {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save(whole, tmp_path / "epoch_12.pth")
    assert b"getattr" in (tmp_path / "epoch_12.pth").read_bytes()
    assert load_detector("auto", str(tmp_path / "epoch_12.pth")).spec.label_names == CLASSES


def test_mmengine_puts_the_averaged_weights_into_state_dict(tmp_path: Path) -> None:
    """Its EMAHook swaps the two before it saves; the file has a counter beside the others."""
    whole = document("mmdet_dino_swin_5scale", random_tensors("mmdet_dino_swin_5scale"))
    last = {f"module.{key}": tensor + 1 for key, tensor in whole["state_dict"].items()}
    torch.save(whole | {"ema_state_dict": last | {"steps": torch.tensor(7)}}, tmp_path / "e.pth")
    expected = load_detector("dino", write(tmp_path / "c.pth", "mmdet_dino_swin_5scale")).spec
    assert load_detector("dino", str(tmp_path / "e.pth")).spec == expected


def test_files_that_lack_something(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    tensors = random_tensors("mmdet_dino_swin_5scale")
    torch.save({"state_dict": tensors}, path)
    with pytest.raises(DetectorError, match=r"of mmdetection and does not hold its configuration"):
        load_detector("dino", str(path))
    weights = random_tensors("detrex_deformable_plain")
    torch.save({"model": weights | {"sem_seg_head.weight": torch.ones(2)}}, path)
    with pytest.raises(DetectorError, match="unexpected tensors: sem_seg_head.weight"):
        load_detector("auto", str(path))
    del weights["neck.convs.1.conv.bias"]
    torch.save({"model": weights}, path)
    with pytest.raises(DetectorError, match=r"missing tensors: input_proj\.1\.0\.bias"):
        load_detector("auto", str(path))
    weights = {k: v for k, v in weights.items() if not k.startswith("backbone.")}
    torch.save({"model": weights | {"backbone.net.pos_embed": torch.ones(1)}}, path)
    with pytest.raises(DetectorError, match="Swin, FocalNet or ConvNeXt as detrex writes it: it h"):
        load_detector("auto", str(path))
    arrays = {k: v.numpy() for k, v in random_tensors("detrex_deformable_plain").items()}
    with path.with_suffix(".pkl").open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "x"}, file)
    with pytest.raises(DetectorError, match=r"c\.pkl is a pickle of arrays, as detectron2 writes"):
        load_detector("auto", str(path.with_suffix(".pkl")))


@pytest.mark.parametrize(
    "name", ["detrex_dino_swin_5scale", "mmdet_dino_swin_5scale", "mmdet2_deformable_two_stage"]
)
def test_tuned_weights_come_back_under_their_names(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "c.pth", name)
    detector: Any = load_detector(detector_of(name), path)
    with torch.no_grad():
        for parameter in detector.tunable_parameters("all"):
            parameter.add_(0.01)
    again = load_detector(detector_of(name), detector.save_weights(tmp_path / "tuned"))
    pixels = torch.randn(1, 3, 64, 96)
    one, other = detector.forward(pixels), again.forward(pixels)
    assert torch.equal(one.class_logits, other.class_logits)
    assert again.spec.label_names == detector.spec.label_names
    written = torch.load(tmp_path / "tuned" / "checkpoint.pth", weights_only=True)
    state = written.get("state_dict") or written["model"]
    assert state.keys() == random_tensors(name).keys()


def test_opencvs_resize(tmp_path: Path) -> None:
    """Against values of cv2 5.0, which the project does not depend on."""
    ramp = (np.arange(5 * 7 * 3) * 37 % 256).astype(np.uint8).reshape(5, 7, 3)
    assert opencv_bilinear(ramp, (3, 4)).tolist() == EXPECTED_SMALLER
    assert opencv_bilinear(ramp, (7, 9))[::3, ::4].tolist() == EXPECTED_LARGER
    resize = Preprocessing(3, 4, None, None, 2, 1.0, None, None, resize="mmcv")
    assert resize(Image.fromarray(ramp)).permute(1, 2, 0).tolist() == EXPECTED_SMALLER
