"""Frozen weights: their hash, and the switch that freezes them."""

import hashlib
from typing import Literal

import torch
from torch import nn

# What a joint training may change of a detector (Table 16).
TunedPart = Literal["encoder-decoder", "all"]


def weights_sha256(module: nn.Module) -> str:
    """Hash of everything a module has learned, independent of how the file was written.

    Args:
        module: A module with its weights loaded.

    Returns:
        SHA-256 over name, type, shape and bytes of every tensor of the state dict, by name.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{values.dtype}|{tuple(values.shape)}|".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def freeze(module: nn.Module) -> nn.Module:
    """Put a module in evaluation mode and stop its gradients.

    Args:
        module: Any module.

    Returns:
        The same module.
    """
    return module.eval().requires_grad_(False)


def parameters_of_part(
    module: nn.Module, backbone: nn.Module, part: TunedPart
) -> list[nn.Parameter]:
    """The parameters of a part of a detector.

    Args:
        module: The detector.
        backbone: Its backbone.
        part: Everything but the backbone, or everything.

    Returns:
        Parameters in the order of the module.
    """
    spared = set() if part == "all" else {id(p) for p in backbone.parameters()}
    return [p for p in module.parameters() if id(p) not in spared]
