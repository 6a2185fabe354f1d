"""What people give in place of a detector's weights is said, with what to give."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.registry import load_detector
from mfdetr_cache.errors import DetectorError
from tests.support.small_checkpoints import state_dict

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.onnx", b"\x08\x08\x12\x07pytorch", "an ONNX model; give the checkpoint that it was"),
        ("a.engine", b"ftrt", "a TensorRT engine; give the checkpoint that it was exported from"),
        ("a.pth", POINTER, "a git-lfs pointer and not the file itself; run: git lfs pull"),
        ("a.safetensors", POINTER, "a git-lfs pointer and not the file itself; run: git lfs pull"),
        ("a.pth", b"<!DOCTYPE html><html>Virus scan warning", "a web page and no weights"),
        ("a.pt", b"\x1f\x8b\x08", "packed; unpack it"),
        ("a.pt", b"", "empty; download it again"),
    ],
)
def test_files_of_something_else(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DetectorError, match=f"is {told}"):
        load_detector("auto", str(tmp_path / name))


def test_torchscript(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as packed:
        for name in ("a/data.pkl", "a/constants.pkl"):
            packed.writestr(name, b"\x80\x02}.")
    with pytest.raises(DetectorError, match="is TorchScript; give the state dict"):
        load_detector("auto", str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("0.conv.weight", "22.dfl.conv.weight"), "YOLO, which is not read"),
        (("0.conv.weight", "24.m.0.weight"), "YOLO, which is not read"),
        (
            ("transformer.encoder.layers.0.self_attn.in_proj_weight", "class_embed.weight"),
            "DETR; give a folder of transformers, or the model's id",
        ),
        (
            (
                "backbone.body.conv1.weight",
                "roi_heads.box_head.fc6.weight",
                "roi_heads.mask_head.mask_fcn1.weight",
                "roi_heads.mask_predictor.conv5_mask.weight",
            ),
            "Mask R-CNN or Keypoint R-CNN",
        ),
        (("sem_seg_head.predictor.query_feat.weight", "backbone.stem.weight"), "Mask2Former or"),
        (("backbone.stem.conv.weight", "bbox_head.cls.0.weight"), "another detector of mmdet"),
        (("decoder.layers.0.self_attn.q_proj.weight", "bbox.weight"), "transformers; give a"),
        (("conv1.weight", "layer4.0.conv1.weight", "fc.weight"), "a backbone alone"),
    ],
)
def test_state_dicts_of_something_else(tmp_path: Path, names: list[str], told: str) -> None:
    torch.save({"model": {f"model.{n}": torch.ones(2) for n in names}}, tmp_path / "best.pth")
    with pytest.raises(DetectorError, match=rf"best\.pth is of {told}"):
        load_detector("auto", str(tmp_path / "best.pth"))


def test_what_a_file_is_decides_and_not_its_name(tmp_path: Path) -> None:
    weights = state_dict("deimv2")
    save_file(weights, tmp_path / "best.pth")
    torch.save(weights, tmp_path / "best.safetensors")
    assert load_detector("auto", str(tmp_path / "best.pth")).spec.name == "deimv2"
    with pytest.raises(DetectorError, match=r"a checkpoint of torch; rename it to best\.pth"):
        load_detector("auto", str(tmp_path / "best.safetensors"))


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("weights/best.pt", r"it has no config\.json; give one of its files: weights/best\.pt"),
        ("global_step9/mp_rank_00_model_states.pt", "DeepSpeed's parts: join them with its zero"),
        ("__0_0.distcp", "parts of a distributed checkpoint"),
    ],
)
def test_folders_of_trainings(tmp_path: Path, file: str, told: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"weights")
    with pytest.raises(DetectorError, match=f"is no detector: {told}"):
        load_detector("auto", str(tmp_path))


def test_an_adapter_beside_its_model_is_not_left_out(tmp_path: Path, rtdetr_folder: Path) -> None:
    shutil.copytree(rtdetr_folder, tmp_path / "tuned")
    (tmp_path / "tuned/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(DetectorError, match=r"an adapter \(PEFT\): merge it"):
        load_detector("auto", str(tmp_path / "tuned"))


def test_files_of_a_transformers_folder(tmp_path: Path, rtdetr_folder: Path) -> None:
    folder = tmp_path / "checkpoint-20"
    shutil.copytree(rtdetr_folder, folder)
    torch.save({"state": {}}, folder / "optimizer.pt")
    for name in ("model.safetensors", "config.json", "optimizer.pt"):
        with pytest.raises(DetectorError, match=f"a transformers folder; give the folder {folder}"):
            load_detector("auto", str(folder / name))
    with pytest.raises(DetectorError, match=r"no config\.json, but checkpoint-20 inside it have"):
        load_detector("auto", str(tmp_path))


def test_folders_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(DetectorError, match=r"an adapter \(PEFT\): merge it"):
        load_detector("auto", str(tmp_path / "adapter"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    zipfile.ZipFile(tmp_path / "a.pth").extractall(tmp_path / "unpacked")
    with pytest.raises(DetectorError, match=r"an unpacked checkpoint: give the \.pth"):
        load_detector("auto", str(tmp_path / "unpacked"))


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def without_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def below(prefix: str) -> Callable[[Path], None]:
    """All weights under another name."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        renamed = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})

    return change


def diverged(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[max(weights)][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def fetched_without_lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(POINTER)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
def test_a_model_that_was_saved_compiled_is_itself(
    tmp_path: Path, rtdetr_folder: Path, prefix: str
) -> None:
    folder = tmp_path / "d"
    shutil.copytree(rtdetr_folder, folder)
    below(prefix)(folder)
    plain, found = (load_detector("hf", str(f)).spec for f in (rtdetr_folder, folder))
    assert found == plain


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_processor, r"has no preprocessor_config\.json, which says how its images"),
        (diverged, "holds numbers that are not finite; did its training diverge"),
        (fetched_without_lfs, r"model\.safetensors is a git-lfs pointer"),
        (below("student."), r"missing keys .* and \d+ more \(it has student\.model\."),
        (configured(quantization_config={"load_in_8bit": True}), "is quantised; give the model"),
        (configured(id2label={"0": "a"}), r"\(3,\) in its weights and \(1,\) .* names 1 classes"),
        (configured(id2label={str(i): "a" for i in range(6)}), "whose id2label names 6 classes"),
        (configured(id2label={"1": "a", "2": "b", "3": "c"}), "not number its classes from 0 on"),
        (configured(id2label=["a", "b", "c"]), "not number its classes from 0 on"),
    ],
)
def test_folders_that_do_not_fit(
    tmp_path: Path, rtdetr_folder: Path, change: Callable[[Path], None], told: str
) -> None:
    folder = tmp_path / "d"
    shutil.copytree(rtdetr_folder, folder)
    change(folder)
    with pytest.raises(DetectorError, match=told):
        load_detector("auto", str(folder))


def test_names_that_are_given_need_none_in_the_folder(tmp_path: Path, rtdetr_folder: Path) -> None:
    folder = tmp_path / "d"
    shutil.copytree(rtdetr_folder, folder)
    configured(id2label={"1": "a", "2": "b", "3": "c"})(folder)
    given = load_detector("auto", str(folder), DetectorOptions(labels=("x", "y", "z")))
    assert given.spec.label_names == ("x", "y", "z")


def test_weights_from_before_safetensors(tmp_path: Path, rtdetr_folder: Path) -> None:
    folder = tmp_path / "d"
    shutil.copytree(rtdetr_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    before, after = (load_detector("auto", str(f)).spec for f in (rtdetr_folder, folder))
    assert after == before

    # One that wants to do something is not asked.
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "was-run",))

    torch.save({"a": Runs()}, folder / "pytorch_model.bin")
    with pytest.raises(DetectorError, match="cannot load the detector"):
        load_detector("auto", str(folder))
    assert not (tmp_path / "was-run").exists()
