"""What a file or folder is that was given in place of a detector's weights, and what to give."""

import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from mfdetr_cache.files import read_regular

_EXPORTED = {
    ".onnx": "an ONNX model",
    ".engine": "a TensorRT engine",
    ".trt": "a TensorRT engine",
    ".tflite": "a TensorFlow Lite model",
    ".xml": "an OpenVINO model",
    ".mlmodel": "a Core ML model",
    ".h5": "a Keras model",
    ".keras": "a Keras model",
    ".gguf": "a GGUF model",
}
_BEGINNINGS = (
    (b"version https://git-lfs", "a git-lfs pointer and not the file itself; run: git lfs pull"),
    (b"<!doctype", "a web page and no weights; download it again"),
    (b"<html", "a web page and no weights; download it again"),
    (b"\x1f\x8b", "packed; unpack it"),
    (b"rar!", "packed; unpack it"),
    (b"7z\xbc\xaf", "packed; unpack it"),
)
_HUB = "give a folder of transformers, or the model's id on the hub"
# Names in a state dict, and whose it is; the first that is found.
_STATE_DICTS = (
    (r"mask_decoder\.|sam_prompt_encoder", "SAM, which is no detector"),
    (r"sem_seg_head\.", "Mask2Former or Mask DINO, which give masks themselves"),
    (r"roi_heads\.(mask|keypoint)_head\.", "Mask R-CNN or Keypoint R-CNN, which are not read"),
    (r"(rpn_head|roi_head|bbox_head|mask_head)\.", "another detector of mmdetection"),
    (r"(\d+\.)+(dfl|cv[23]\.|m\.\d\.weight|anchors)", "YOLO, which is not read"),
    (r"transformer\.decoder\.layers\.0\.ca_q", f"Conditional DETR or DAB-DETR; {_HUB}"),
    (r"transformer\.encoder\.layers\.0\.self_attn\.in_proj", f"DETR; {_HUB}"),
    (r"(model\.)?decoder\.layers\.0\.self_attn\.(q_proj|o_proj)", f"transformers; {_HUB}"),
    (r"(layer4|stages\.3|blocks\.11)\.", "a backbone alone"),
)
_WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors")


def told_of_tensors(names: Iterable[str]) -> str:
    """Such as ``is of SAM, ...``, by the names in a state dict; empty where they say nothing."""
    listed = list(names)
    found = (what for key, what in _STATE_DICTS if any(re.match(key, name) for name in listed))
    return next((f"is of {what}" for what in found), "")


def told_of_file(path: Path, *, of_folder: bool = False) -> str:
    """Such as ``is an ONNX model; ...``; empty for what may be weights.

    ``of_folder``: it was found in a folder of transformers, and not given itself.
    """
    exported = _EXPORTED.get(path.suffix.lower())
    if exported is not None:
        return f"is {exported}; give the checkpoint that it was exported from"
    if not of_folder and has_model_type(path.parent):
        return f"is a file of a transformers folder; give the folder {path.parent}"
    if not path.stat().st_size:
        return "is empty; download it again"
    with path.open("rb") as file:
        begins = file.read(64).lstrip().lower()
    if begins.startswith(b"pk") and _is_torchscript(path):
        return "is TorchScript; give the state dict of the model that it was made from"
    return next((f"is {what}" for start, what in _BEGINNINGS if begins.startswith(start)), "")


def told_of_folder(folder: Path) -> str:
    """Why a folder without ``config.json`` is no detector, and what to give."""
    if (folder / "adapter_config.json").is_file():
        return "an adapter (PEFT): merge it into its model and save that"
    if next(folder.rglob("data.pkl"), None):
        return "an unpacked checkpoint: give the .pth file itself"
    inside = sorted(f.name for f in folder.iterdir() if f.is_dir() and has_model_type(f))
    if inside:
        return f"it has no config.json, but {', '.join(inside[-3:])} inside it have: give one"
    if next(folder.glob("*/*_model_states.pt"), None):
        return "DeepSpeed's parts: join them with its zero_to_fp32.py and give that file"
    if next(folder.glob("*.distcp"), None):
        return "parts of a distributed checkpoint: torch.distributed.checkpoint joins them"
    files = sorted(
        str(file.relative_to(folder))
        for file in (*folder.glob("*"), *folder.glob("weights/*"))
        if file.suffix in _WEIGHTS and file.is_file()
    )
    if files:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        return f"it has no config.json; give one of its files: {', '.join(files[:3])}{more}"
    return "it has no config.json"


def has_model_type(folder: Path) -> bool:
    """Whether a folder has a configuration with a transformers model type."""
    try:
        config = json.loads(read_regular(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("model_type"))


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as packed:
            return any(name.endswith("/constants.pkl") for name in packed.namelist())
    except (zipfile.BadZipFile, OSError, UnicodeError, OverflowError):
        return False
