"""Weights of a detector: their hash, what is frozen or tuned of them, their file."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mfdetr_cache.errors import DetectorError
from mfdetr_cache.files import make_folder, whole_file

# What a joint training may change of a detector (Table 16).
TunedPart = Literal["encoder-decoder", "all"]


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of every tensor of the state dict, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{values.dtype}|{tuple(values.shape)}|".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_complete(where: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """DetectorError, naming some, if a model lacks tensors or a checkpoint has others."""
    for kind, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
        if names:
            shown = ", ".join(names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise DetectorError(
                f"{where}: {kind} tensors: {shown}{more}; the result would be partly random"
            )


def write_checkpoint(folder: Path, document: object) -> str:
    """Write ``checkpoint.pth`` into a folder, which is made; returns its path."""
    make_folder(folder)
    path = folder / "checkpoint.pth"
    with whole_file(path) as partial, partial.open("wb") as file:
        torch.save(document, file)
    return str(path)


def freeze(module: nn.Module) -> nn.Module:
    """Set evaluation mode and disable gradients, in place; returns the module."""
    return module.eval().requires_grad_(False)


def parameters_of_part(
    module: nn.Module, backbone: nn.Module, part: TunedPart
) -> list[nn.Parameter]:
    """Parameters of a detector in module order: all, or all but the backbone's."""
    spared = set() if part == "all" else {id(p) for p in backbone.parameters()}
    return [p for p in module.parameters() if id(p) not in spared]
