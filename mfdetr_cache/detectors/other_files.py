"""What a file or folder is that was given in place of a detector's weights, and what to give."""

import json
import zipfile
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


def told_of_file(path: Path, *, of_folder: bool = False) -> str:
    """Such as ``is an ONNX model; ...``; empty for what may be weights.

    ``of_folder``: it was found in a folder of transformers, and not given itself.
    """
    exported = _EXPORTED.get(path.suffix.lower())
    if exported is not None:
        return f"is {exported}; give the checkpoint that it was exported from"
    if not of_folder and has_model_type(path.parent):
        return f"is a file of a transformers folder; give the folder {path.parent}"
    with path.open("rb") as file:
        begins = file.read(64).lstrip().lower()
    if begins.startswith(b"pk") and _is_torchscript(path):
        return "is TorchScript; give the state dict of the model that it was made from"
    return next((f"is {what}" for start, what in _BEGINNINGS if begins.startswith(start)), "")


def told_of_folder(folder: Path) -> str:
    """Why a folder without ``config.json`` is no detector, and what to give."""
    if (folder / "adapter_config.json").is_file():
        return "an adapter alone (PEFT): merge it into its model and save that"
    if next(folder.rglob("data.pkl"), None):
        return "an unpacked checkpoint: give the .pth file itself"
    inside = sorted(f.name for f in folder.iterdir() if f.is_dir() and has_model_type(f))
    if inside:
        return f"it has no config.json, but {', '.join(inside[-3:])} inside it have: give one"
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
