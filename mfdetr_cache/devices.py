"""Where to compute: a device by name, or one clear line."""

import os

import torch
from torch import Tensor

from mfdetr_cache.errors import ConfigError


def torch_device(name: str) -> torch.device:
    """A device by name, checked.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` takes a GPU if there is one. Of several
            processes on a machine (``LOCAL_RANK``), each one gets its own by ``auto`` or ``cuda``.

    Returns:
        The device.

    Raises:
        ConfigError: If there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is no device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: no CUDA GPU is available here; use --device cpu")
    return device


def threads_beside_gpu(most: int) -> int:
    """How many threads of this process may work while its GPU computes.

    Args:
        most: Beyond which more would not help.

    Returns:
        Half of the cores, shared with the other processes that torchrun started here; 1 or more.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(most, cores // 2))


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of this process's memory on a device, without waiting for the copy.

    Args:
        tensor: On the CPU.
        device: Where to; a GPU is reached through pinned memory, in its current stream.

    Returns:
        The tensor on the device.
    """
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def is_plain(tensor: Tensor) -> bool:
    """Whether numbers are there to be computed with by kernels of our own.

    Args:
        tensor: Any tensor.

    Returns:
        False where it is traced, compiled, exported or counted.
    """
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch.compiler.is_compiling()
        and not torch.onnx.is_in_onnx_export()
    )
