"""A trained head as a folder: its weights, its architecture, and the detector it belongs to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mfdetr_cache.choices import Which
from mfdetr_cache.config import from_dict, to_dict
from mfdetr_cache.errors import HeadError
from mfdetr_cache.files import write_atomically
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.identity import Identity, spec_from_identity

HEAD_FILE = "head.safetensors"
BEST_HEAD_FILE = "head-best.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class HeadFolder:
    """A trained head and what it belongs to.

    Attributes:
        head: The mask network, in evaluation mode.
        detector: Identity of the detector it was trained for.
        document: The whole ``config.json``.
        path: The folder.
    """

    head: MaskHead
    detector: Identity
    document: dict[str, Any]
    path: Path


_FILES: dict[Which, str] = {"last": HEAD_FILE, "best": BEST_HEAD_FILE}


def save_head(folder: Path, weights: Mapping[str, Tensor], which: Which = "last") -> None:
    """Write the weights of a head.

    Args:
        folder: The run folder.
        weights: State dict of a MaskHead.
        which: Those of the end, or of the best validation.

    Raises:
        OutputError: If the disk is full; the weights before are kept.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    # Not save_file, whose files nobody else may read.
    write_atomically(folder / _FILES[which], save(tensors, metadata={"format": "pt"}))


def save_run_config(folder: Path, config: HeadConfig, document: dict[str, Any]) -> None:
    """Write a run's ``config.json``.

    Args:
        folder: The run folder.
        config: Architecture of the head.
        document: Everything else: training settings, identities, versions.

    Raises:
        OutputError: If the disk is full.
    """
    full = {"head": to_dict(config), **document}
    write_atomically(folder / CONFIG_FILE, json.dumps(full, indent=2).encode())


def load_head(folder: Path, which: Which = "last") -> HeadFolder:
    """A trained head from its run folder.

    Args:
        folder: What ``train-head --out`` wrote.
        which: The weights of the end, or of the best validation.

    Returns:
        The head on the CPU and what it belongs to.

    Raises:
        HeadError: If something is missing, damaged or does not fit together.
    """
    weights_file = folder / _FILES[which]
    for file in (folder / CONFIG_FILE, weights_file):
        if not file.is_file():
            if which == "best" and (folder / HEAD_FILE).is_file():
                raise HeadError(
                    f"{folder} has no {BEST_HEAD_FILE}: it was trained without --val-cache; use "
                    "--which last"
                )
            raise HeadError(
                f"{folder} is no trained head: it has no {file.name}; pass a train-head --out"
            )
    try:
        document = json.loads((folder / CONFIG_FILE).read_bytes())
        detector = document["detector"]
        config = from_dict(HeadConfig, document["head"], f"{folder / CONFIG_FILE}: head")
        head = build_head(config, spec_from_identity(detector))
    except (ValueError, KeyError, TypeError) as error:
        raise HeadError(f"{folder / CONFIG_FILE} is damaged ({error!r})") from error
    try:
        weights = load_file(weights_file)
    except (SafetensorError, OSError) as error:
        raise HeadError(f"{weights_file} is damaged ({error})") from error
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise HeadError(f"{weights_file} does not fit its config.json: {reason}") from error
    return HeadFolder(head.eval(), detector, document, folder)
