"""Checkpoints in the layouts of today's DETRs: what is read off them and how they come back."""

import argparse
import json
import textwrap
import zipfile
from collections import defaultdict, deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mfdetr_cache.detectors.checkpoint import read_checkpoint
from mfdetr_cache.detectors.conformance import DetectorConformance
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.protocol import Detector, TunableDetector
from mfdetr_cache.detectors.registry import load_detector, load_with_options_of
from mfdetr_cache.detectors.translated.rf_detr_masks import PREFIX
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.identity import detector_identity
from tests.support.small_checkpoints import LABELS, SMALL, state_dict, write_small


class TestConformance(DetectorConformance):
    """Every family from a small checkpoint in its authors' layout."""

    name: str
    path: Path

    @pytest.fixture(autouse=True, scope="class", params=list(SMALL))
    @classmethod
    def _one_family(
        cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.mktemp("authors") / "best.pth"
        cls.name, cls.path = request.param, path
        write_small(path, request.param)

    def make_detector(self) -> Detector:
        # Conformance crops the image: 240 tokens of strides 16 and 32 are fewer than 300 queries.
        options = DetectorOptions(num_queries=50 if self.name == "deimv2" else None)
        return load_detector(self.name, str(self.path), options)


MAPS = {
    "rt-detr": ["c1", "encoder8", "encoder16", "encoder32"],
    "deimv2": ["c1", "backbone8", "encoder16", "encoder32"],
    "rf-detr": ["encoder16"],
}


@pytest.mark.parametrize("name", list(MAPS))
def test_what_is_read_off_a_checkpoint(tmp_path: Path, name: str) -> None:
    write_small(tmp_path / "best.pth", name)
    spec = load_detector(name, str(tmp_path / "best.pth")).spec
    assert spec.name == name
    assert spec.label_names == LABELS
    assert [m.name for m in spec.maps] == MAPS[name]
    assert spec.query_dim == 32


def test_the_input_size_is_read_off_the_anchors(tmp_path: Path) -> None:
    """Not square: 160 high and 192 wide."""
    write_small(tmp_path / "best.pth", "rt-detr-v2")
    detector = load_detector("rt-detr-v2", str(tmp_path / "best.pth"))
    assert detector.input_geometry((50, 70)).input_hw == (160, 192)


@pytest.mark.parametrize(
    "container",
    [
        lambda sd: sd,
        lambda sd: {"model": sd, "optimizer": {"state": {}}, "last_epoch": 3},
        lambda sd: {"model": _spoilt(sd), "ema": {"module": sd, "updates": 9}},
        lambda sd: {"model_state_dict": sd},
        lambda sd: {"ema_state_dict": sd},
        lambda sd: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in sd.items()}},
        lambda sd: {"state_dict": {f"net.detr.{k}": v for k, v in sd.items()}},
        lambda sd: {"model": {f"module._orig_mod.{k}": v for k, v in sd.items()}},
        lambda sd: {"model": sd, "args": argparse.Namespace(lr=1e-4, path=Path("x"))},
        lambda sd: {"model": sd, "args": argparse.Namespace(**_SETTINGS)},
        lambda sd: {"model": sd, "cfg": SimpleNamespace(inner=SimpleNamespace(width=3))},
        lambda sd: {
            "state_dict": {"criterion.weight": torch.ones(3)}
            | {f"model._orig_mod.{k}": v for k, v in sd.items()},
            "pytorch-lightning_version": "2.5",
        },
    ],
    ids=[
        "bare",
        "model",
        "ema",
        "state",
        "ema-state",
        "averaged",
        "held",
        "wrapped",
        "namespace",
        "settings",
        "object",
        "lightning",
    ],
)
def test_containers(tmp_path: Path, container: Any) -> None:
    """The same detector whatever it is wrapped into."""
    weights = state_dict("d-fine")
    torch.save(weights, tmp_path / "plain.pth")
    torch.save(container(weights), tmp_path / "best.pth")
    plain = load_detector("d-fine", str(tmp_path / "plain.pth"))
    found = load_detector("d-fine", str(tmp_path / "best.pth"))
    assert found.spec == plain.spec


class _Config(dict[str, Any]):
    """As yacs, EasyDict and addict keep settings."""


# What torch does not read by itself.
_SETTINGS = {
    "config": _Config(model=_Config(width=3)),
    "by_class": defaultdict(list, {1: [2]}),
    "losses": deque([0.5], maxlen=3),
    "best": np.float64(0.4),
    "curve": np.zeros((2, 3)),
    "sizes": frozenset([3]),
    "hook": textwrap.dedent,
}


def test_settings_in_files_of_old_torch(tmp_path: Path) -> None:
    """These are plain pickles, whose classes are met one after the other."""
    document = {"model": state_dict("deimv2"), "args": argparse.Namespace(**_SETTINGS)}
    document["args"].class_names = list(LABELS)
    torch.save(document, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_detector("deimv2", str(tmp_path / "old.pth")).spec.label_names == LABELS


def _spoilt(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.zeros_like(v) for k, v in weights.items()}


def test_a_mask_branch_of_another_shape_is_named(tmp_path: Path) -> None:
    weights = state_dict("rf-detr")
    branch = [name for name in weights if name.startswith(PREFIX)]
    for name in (branch[0], branch[-1], f"{PREFIX}query_features_proj.bias"):
        torch.save({**weights, name: torch.zeros(0)}, tmp_path / "w.pth")
        with pytest.raises(DetectorError, match=rf"w\.pth: {PREFIX}.* is \(.*\), expected \("):
            load_detector("rf-detr", str(tmp_path / "w.pth"))


def test_a_damaged_download_is_noticed(tmp_path: Path) -> None:
    """One bit of a weight; without checksums, as torch can be told, a file is read as it is."""
    path = tmp_path / "weights.pth"
    weights = {"a": torch.arange(1000.0), "b": torch.ones(3)}
    torch.save(weights, path)
    data = bytearray(path.read_bytes())
    data[data.index(weights["a"].numpy().tobytes()) + 2001] ^= 1
    path.write_bytes(data)
    with pytest.raises(DetectorError, match=r"weights\.pth is damaged: its content is not what"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("weights/data.pkl", b"")
    with pytest.raises(DetectorError, match="was packed again with compression"):
        read_checkpoint(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(path).tensors["a"], weights["a"])


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(1).expand(10**9, 10**3),
        torch.empty(3, device="meta"),
        torch.zeros(3).to_sparse(),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, dtype=torch.int8),
    ],
    ids=["expanded", "meta", "sparse", "complex", "int8"],
)
def test_tensors_that_are_not_what_they_say_are_no_weights(
    tmp_path: Path, odd: torch.Tensor
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": {"a": torch.ones(4)[1:], "b": odd}}, path)
    with pytest.raises(DetectorError, match=r"weights\.pth: b is quantised, complex, sparse or"):
        read_checkpoint(path)


def test_safetensors_and_half_precision(tmp_path: Path) -> None:
    weights = {f"module.{k}": v for k, v in state_dict("rt-detr").items()}
    save_file(weights, tmp_path / "best.safetensors")
    torch.save(state_dict("rt-detr"), tmp_path / "best.pth")
    one = load_detector("rt-detr", str(tmp_path / "best.safetensors"))
    assert one.spec == load_detector("rt-detr", str(tmp_path / "best.pth")).spec
    # As authors put it on the hub: a folder of theirs, whose configuration is no transformers'.
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"backbone": "PResNet"}))
    assert load_detector("auto", str(folder)).spec == one.spec
    half = {k: v.half() if v.is_floating_point() else v for k, v in state_dict("rt-detr").items()}
    torch.save(half, tmp_path / "half.pth")
    rounded = load_detector("rt-detr", str(tmp_path / "half.pth"))
    assert all(p.dtype == torch.float32 for p in rounded.parameters())  # type: ignore[attr-defined]


def test_activation_and_sampling_are_what_the_user_says(tmp_path: Path) -> None:
    """Equal files, other numbers: the name decides, and the identity keeps it."""
    pixels = torch.rand(1, 3, 160, 192, generator=torch.Generator().manual_seed(1))
    for names, setting in (
        (("d-fine", "deim"), "activation"),
        (("rt-detr-v2", "rt-detr-v2-dsp"), "sampling"),
    ):
        write_small(tmp_path / "best.pth", names[0])
        one, other = (load_detector(n, str(tmp_path / "best.pth")) for n in names)
        assert one.spec.weights_sha256 == other.spec.weights_sha256
        assert one.spec.settings[setting] != other.spec.settings[setting]
        gap = one.forward(pixels).class_logits - other.forward(pixels).class_logits
        assert gap.abs().max() > 1e-2
        with pytest.raises(DetectorError, match=f"can be {names[0]} or {names[1]}: the file does"):
            load_detector("auto", str(tmp_path / "best.pth"))


@pytest.mark.parametrize("name", ["rt-detr", "deimv2", "rf-detr", "lw-detr"])
def test_the_detector_may_be_left_out(tmp_path: Path, name: str) -> None:
    write_small(tmp_path / "best.pth", name)
    found = load_detector("auto", str(tmp_path / "best.pth"))
    assert found.spec == load_detector(name, str(tmp_path / "best.pth")).spec
    other = "d-fine" if name != "d-fine" else "deimv2"
    with pytest.raises(DetectorError, match=rf"no checkpoint of D-FINE .* it can be {name}"):
        load_detector(other, str(tmp_path / "best.pth"))


def test_files_that_are_no_detector(tmp_path: Path) -> None:
    torch.save({"model": {"a.weight": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(DetectorError, match="no checkpoint of a known detector"):
        load_detector("auto", str(tmp_path / "other.pth"))
    weights = state_dict("deimv2")
    del weights["decoder.pre_bbox_head.layers.1.bias"]
    torch.save(weights, tmp_path / "cut.pth")
    with pytest.raises(DetectorError, match=r"missing tensors: model.decoder.pre_bbox_head.layers"):
        load_detector("deimv2", str(tmp_path / "cut.pth"))
    weights = state_dict("deimv2") | {"decoder.more": torch.ones(2)}
    torch.save(weights, tmp_path / "more.pth")
    with pytest.raises(DetectorError, match=r"unexpected tensors: decoder.more"):
        load_detector("deimv2", str(tmp_path / "more.pth"))
    other = weights | {"decoder.dec_bbox_head.1.layers.2.bias": torch.ones(132)}
    del other["decoder.more"]
    torch.save(other, tmp_path / "apart.pth")
    with pytest.raises(
        DetectorError, match="bbox_head.0.layers.2.bias are shared in this detector"
    ):
        load_detector("deimv2", str(tmp_path / "apart.pth"))
    del weights["encoder.bi_fusion.cv.conv.weight"], weights["decoder.more"]
    torch.save(weights, tmp_path / "key.pth")
    with pytest.raises(DetectorError, match="as its authors write it: it has no encoder"):
        load_detector("deimv2", str(tmp_path / "key.pth"))


@pytest.mark.parametrize("name", ["rt-detr", "deim", "deimv2", "rf-detr"])
def test_tuned_weights_come_back_in_the_authors_layout(tmp_path: Path, name: str) -> None:
    """All parameters move; what is saved is the same detector, under the names it came with."""
    document = write_small(tmp_path / "best.pth", name)
    detector = load_detector(name, str(tmp_path / "best.pth"))
    assert isinstance(detector, TunableDetector)
    everything = detector.tunable_parameters("all")
    assert 0 < len(detector.tunable_parameters("encoder-decoder")) < len(everything)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in everything:
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    path = detector.save_weights(tmp_path / "after")
    saved = torch.load(path, weights_only=True)["model"]
    assert saved.keys() == document["model"].keys()
    assert all(saved[k].shape == v.shape for k, v in document["model"].items())
    if name == "deimv2":
        # One head of all layers, under each of its names.
        heads = [saved[f"decoder.dec_bbox_head.{i}.layers.2.weight"] for i in range(2)]
        assert torch.equal(*heads)
        assert not torch.equal(
            heads[0], document["model"]["decoder.dec_bbox_head.0.layers.2.weight"]
        )
    again = load_detector(name, path)
    pixels = detector.preprocess(Image.effect_noise((130, 90), 60).convert("RGB"))[None]
    before, after = detector.forward(pixels), again.forward(pixels)
    assert torch.equal(before.class_logits, after.class_logits)
    assert all(torch.equal(before.maps[n], after.maps[n]) for n in before.maps)


@pytest.mark.parametrize("share", [0.0, 3.0, float("nan")])
def test_damaged_numbers_of_points_are_named(tmp_path: Path, share: float) -> None:
    weights = state_dict("deimv2")
    scale = "decoder.decoder.layers.0.cross_attn.num_points_scale"
    weights[scale] = torch.full_like(weights[scale], share)
    torch.save(weights, tmp_path / "best.pth")
    with pytest.raises(DetectorError, match="num_points_scale has .*: these weights are damaged"):
        load_detector("auto", str(tmp_path / "best.pth"))


@pytest.mark.parametrize("name", ["rf-detr", "lw-detr"])
def test_arguments_that_no_tensor_tells_are_those_that_are_read(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "best.pth")
    document = {"model": state_dict(name)}
    torch.save({**document, "args": {"sa_nheads": 1, "ca_nheads": 2, "two_stage": True}}, path)
    load_detector("auto", path)
    torch.save({**document, "args": argparse.Namespace(lite_refpoint_refine=False)}, path)
    with pytest.raises(DetectorError, match="lite_refpoint_refine=False, which is not read"):
        load_detector("auto", path)


def test_another_input_size(tmp_path: Path) -> None:
    """RT-DETR's files do not tell it; heads and caches keep it."""
    write_small(tmp_path / "best.pth", "rt-detr")
    path = str(tmp_path / "best.pth")
    wide = load_detector("rt-detr", path, DetectorOptions(input_size=(96, 160)))
    assert wide.input_geometry((50, 70)).input_hw == (96, 160)
    again = load_with_options_of(detector_identity(wide.spec), path)
    assert again.spec == wide.spec
    with pytest.raises(DetectorError, match="--input-size 100x100: the sides must be multiples of"):
        load_detector("rt-detr", path, DetectorOptions(input_size=(100,)))
    with pytest.raises(DetectorError, match="does not run at 64 x 64: it has more queries than"):
        load_detector("rt-detr", path, DetectorOptions(input_size=(64,)))
    with pytest.raises(DetectorError, match="--score-threshold: all queries of rt-detr are kept"):
        load_detector("rt-detr", path, DetectorOptions(score_threshold=0.1))


def test_class_heads_without_an_output_are_refused(tmp_path: Path) -> None:
    weights = {k: t[:0] if "score" in k else t for k, t in state_dict("rt-detr").items()}
    torch.save({"model": weights}, tmp_path / "best.pth")
    with pytest.raises(DetectorError, match="does not run at .*, and are its weights whole"):
        load_detector("rt-detr", str(tmp_path / "best.pth"), DetectorOptions())


def test_settings_that_are_read_come_back_with_tuned_weights(tmp_path: Path) -> None:
    """An RF-DETR that was trained at another size, with other windows than its patches suggest."""
    args = argparse.Namespace(resolution=256, num_windows=4)
    torch.save({"model": state_dict("rf-detr"), "args": args}, tmp_path / "best.pth")
    detector = load_detector("rf-detr", str(tmp_path / "best.pth"))
    assert isinstance(detector, TunableDetector)
    again = load_detector("rf-detr", detector.save_weights(tmp_path / "after"))
    assert again.input_geometry((50, 70)).input_hw == (256, 256)
    assert again.spec == detector.spec


def test_rt_detr_v4_is_deim_with_a_projector_of_its_training(tmp_path: Path) -> None:
    weights = state_dict("deim")
    torch.save(weights, tmp_path / "deim.pth")
    weights["encoder.feature_projector.0.weight"] = torch.ones(768, 32)
    weights["encoder.feature_projector.0.bias"] = torch.ones(768)
    torch.save({"ema": {"module": weights}}, tmp_path / "best.pth")
    found = load_detector("auto", str(tmp_path / "best.pth"))
    deim = load_detector("deim", str(tmp_path / "deim.pth"))
    assert found.spec.name == "rt-detr-v4"
    assert replace(found.spec, name="deim") == deim.spec
    with pytest.raises(DetectorError, match="no checkpoint of D-FINE .* it can be rt-detr-v4"):
        load_detector("d-fine", str(tmp_path / "best.pth"))


def test_queries_are_as_many_as_asked_for(tmp_path: Path) -> None:
    write_small(tmp_path / "best.pth", "d-fine")
    few = load_detector("d-fine", str(tmp_path / "best.pth"), DetectorOptions(num_queries=7))
    assert few.forward(torch.rand(1, 3, 160, 160)).queries.shape == (1, 7, 32)
    write_small(tmp_path / "best.pth", "lw-detr")
    with pytest.raises(DetectorError, match="--num-queries 21: this detector has 1 to 20"):
        load_detector("lw-detr", str(tmp_path / "best.pth"), DetectorOptions(num_queries=21))
