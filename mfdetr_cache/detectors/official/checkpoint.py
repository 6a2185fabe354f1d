"""Checkpoint files of the official detectors, read without running anything that is in them."""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mfdetr_cache.errors import DetectorError

# What released checkpoints hold beside tensors: their training arguments.
_ALLOWED: list[Any] = [argparse.Namespace]
# Where the weights are, the first that is there.
_WEIGHT_KEYS = ("model", "state_dict", "ema_model")


def load_official_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint.

    Args:
        path: A ``.pth`` or ``.pt`` file with the weights below ``model`` (as training scripts
            write it) or by themselves, or a ``.safetensors`` file.

    Returns:
        Name to tensor; a leading ``module.`` is removed.

    Raises:
        DetectorError: If the file is missing, damaged, holds no weights, or asks for code to run.
    """
    if path.is_dir():
        raise DetectorError(f"{path} is a folder; this detector takes a checkpoint file (.pth)")
    if not path.is_file():
        raise DetectorError(f"checkpoint {path} does not exist; check --weights")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DetectorError(f"{path} is no safetensors file ({error})") from error
    return _state_dict(_load_pickle(path), path)


def _load_pickle(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        # torch names the global it met; its advice to load unsafely is not passed on.
        met = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"global (\S+)", str(error))
        if met:
            raise DetectorError(
                f"{path} asks for {met.group(1)} to be run while loading, which is refused; save "
                "its state dict alone (torch.save(checkpoint['model'], ...)) where you trust it"
            ) from None
        raise DetectorError(f"{path} cannot be read as a checkpoint") from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise DetectorError(f"{path} is damaged or no PyTorch checkpoint") from error


def _is_zip(path: Path) -> bool:
    """Files of torch before 1.6 are plain pickles and cannot be mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _state_dict(document: object, path: Path) -> dict[str, Tensor]:
    found: object = document
    if isinstance(document, Mapping):
        for key in _WEIGHT_KEYS:
            if isinstance(document.get(key), Mapping):
                found = document[key]
                break
    if not isinstance(found, Mapping) or not found:
        raise DetectorError(f"{path} holds no state dict (looked for {', '.join(_WEIGHT_KEYS)})")
    tensors = {str(k).removeprefix("module."): v for k, v in found.items()}
    wrong = [k for k, v in tensors.items() if not isinstance(v, Tensor)]
    if wrong:
        raise DetectorError(f"{path}: {wrong[0]} is no tensor; this is no state dict of a detector")
    return tensors
