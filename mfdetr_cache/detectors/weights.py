"""Frozen weights: their hash, and the switch that freezes them."""

import hashlib

import torch
from torch import nn


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
