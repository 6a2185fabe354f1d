"""Devices by name, and transfers that do not block."""

import contextlib
import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfdetr_cache.errors import ConfigError

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def torch_device(name: str) -> torch.device:
    """The device ``cpu``, ``cuda``, ``cuda:N`` or ``auto`` (a GPU if there is one).

    Of several processes on a machine (``LOCAL_RANK``), ``auto`` and ``cuda`` give each its own GPU.
    ConfigError if there is no such device.
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


def exact_float32() -> None:
    """Compute float32 as float32 from now on, in this process: no TF32, nor bfloat16 on a CPU.

    What a frozen detector gives is part of a cache's identity and must not depend on what somebody
    else chose. cuDNN's convolutions use TF32 unless told not to.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to a device asynchronously, through pinned memory in the current stream."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def start_copy_to_host(numbers: Tensor) -> Callable[[], list[float]]:
    """Start an asynchronous copy of (N,) values to the host; the function returned waits for it.

    It waits only for work queued before the copy.
    """
    (here,), wait = start_copies_to_host([numbers])

    def values() -> list[float]:
        wait()
        found: list[float] = here.tolist()
        return found

    return values


def start_copies_to_host(
    tensors: Sequence[Tensor],
) -> tuple[Sequence[Tensor], Callable[[], object]]:
    """Start asynchronous copies of tensors of one device, on a stream of their own.

    Returns them, and what waits in any thread until they hold their values; work that is queued
    later goes on beside them. Of a CPU the tensors themselves.
    """
    device = tensors[0].device
    if device.type != "cuda":
        return tensors, lambda: None
    side = torch.cuda.Stream(device)
    side.wait_event(torch.cuda.current_stream(device).record_event())
    # Threads that wait sleep: their cores have other work.
    arrived = torch.cuda.Event(blocking=True)
    with torch.cuda.stream(side):
        # torch takes pinned memory for this by itself.
        here = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        arrived.record(side)
    for tensor in tensors:
        # Its memory must not be given to other work while it is still read.
        tensor.record_stream(side)
    return here, arrived.synchronize


class DeviceTime:
    """Adds up the seconds in which a device is at some work, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """What is started here is the work."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        begin.record(stream)
        yield
        end.record(stream)
        self._spans.append((begin, end))
        while self._spans and self._spans[0][1].query():
            self._close(*self._spans.pop(0))

    @property
    def seconds(self) -> float:
        """Of the work so far; waits for it."""
        for begin, end in self._spans:
            end.synchronize()
            self._close(begin, end)
        self._spans = []
        return self._seconds

    def _close(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._seconds += begin.elapsed_time(end) / 1e3


def pinned_array(count: int, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """An uninitialised flat array in pinned memory, which a GPU reads asynchronously.

    torch reuses the memory for the next such array. Ordinary memory, slower to copy, where no more
    can be pinned.
    """
    try:
        memory = torch.empty(count * dtype.itemsize, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return np.empty(count, dtype)
    return memory.numpy().view(dtype)


def concatenate_on(arrays: Sequence[NDArray[np.generic]], device: torch.device | str) -> Tensor:
    """Concatenate arrays along the first axis on a device, without waiting for the copies.

    Those of :func:`pinned_array` are copied straight to a GPU.
    """
    if torch.device(device).type == "cuda" and all(a.flags.writeable for a in arrays):
        parts = [torch.from_numpy(a) for a in arrays]
        # Whoever read one of them so read all of them so; any memory would do, only more slowly.
        if parts[0].is_pinned():
            counts = [len(part) for part in parts]
            joined = parts[0].new_empty(sum(counts), *parts[0].shape[1:], device=device)
            for place, part in zip(joined.split(counts), parts, strict=True):
                place.copy_(part, non_blocking=True)
            return joined
    return to_device(torch.from_numpy(np.concatenate(arrays)), device)


def is_plain(tensor: Tensor) -> bool:
    """Whether custom kernels may take a tensor: no subclass, not traced, compiled or exported."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch.compiler.is_compiling()
        and not torch.onnx.is_in_onnx_export()
    )


def kept(maxsize: int) -> Callable[[Callable[P, ResultT]], Callable[P, ResultT]]:
    """Decorator: what a function returned for its last ``maxsize`` arguments is returned again.

    For constants on a device: a copy in every call would wait for the GPU. Where :func:`is_plain`
    does not hold they are made anew.
    """

    def decorate(make: Callable[P, ResultT]) -> Callable[P, ResultT]:
        @functools.lru_cache(maxsize)
        def keep(*args: P.args, **kwargs: P.kwargs) -> ResultT:
            # An inference tensor could not be used by a later training.
            with torch.inference_mode(mode=False):
                return make(*args, **kwargs)

        @functools.wraps(make)
        def remembered(*args: P.args, **kwargs: P.kwargs) -> ResultT:
            return (keep if is_plain(torch.empty(0)) else make)(*args, **kwargs)  # type: ignore[arg-type]

        return remembered

    return decorate


def keep_no_kernels() -> None:
    """Ask oneDNN not to keep a kernel for each of the last 1024 shapes that it has seen.

    The regions of every step of a mask network are another shape, so that none is used twice, and
    what the kernels leave between them in memory cannot be used again: 280 MB in 600 steps. Without
    them a step takes the same time. For training on cached features only; no effect once a
    convolution has run.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks for the next tensor; False with another C library.

    By default every tensor above some megabytes is a fresh mapping that the kernel fills with zeros
    page by page. Keeping them took a training step of the mask network from 2.1 s to 1.4 s on two
    cores, and H-DETR R50 at 800 x 1066 from 4.0 s to 3.4 s. For the commands only: it holds for the
    whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
