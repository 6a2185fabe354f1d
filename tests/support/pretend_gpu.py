"""A second memory to compute in: what must be moved to a GPU shows on a machine without one.

``with pretend_gpu():`` makes ``cuda`` a device that exists. Its tensors lie in this machine's
memory and are computed by the CPU's operators, but they belong elsewhere: an operator that meets a
tensor of each place raises as CUDA would, and so does ``numpy()``. Streams, kernels, autocast and
speed are not pretended.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

_CUDA = torch.device("cuda", 0)
_ATEN = torch.ops.aten
# Operators that copy between memories, and those that take indices from either.
_COPIES = {_ATEN.copy_.default, _ATEN._to_copy.default}
_INDEXES = {
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default,
    _ATEN._unsafe_index.Tensor,
}


class GpuTensor(Tensor):
    """A tensor that is not in this machine's memory, as far as anyone can tell.

    Attributes:
        inner: Where its numbers really are.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "GpuTensor":
        found: GpuTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
        )
        found.inner = inner
        return found

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> "GpuTensor":
        return GpuTensor(inner["inner"])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GpuTensor({self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as what lies in this machine's memory: what is loaded goes there first."""
        return self.inner.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _COPIES:
            # Indices and single numbers may come from this memory.
            concerned = (args[0], *args[2:]) if func in _INDEXES else (args, kwargs)
            given = [a for a in tree_flatten(concerned)[0] if isinstance(a, Tensor) and a.dim()]
            if len({isinstance(a, GpuTensor) for a in given}) > 1:
                raise RuntimeError(f"{func}: tensors are not on the same device: cuda:0 and cpu")
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if func is _ATEN.copy_.default:
            return args[0]
        wrapped = tree_map(lambda r: GpuTensor(r) if type(r) is Tensor else r, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, GpuTensor) else value


class _Upload(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, here: Tensor) -> Tensor:
        return GpuTensor(here.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _inner(grad)


class _Download(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, there: Any) -> Any:
        return _inner(there).detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return GpuTensor(grad)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    there, wanted = isinstance(tensor, GpuTensor), device.type == "cuda"
    if device.type == "meta":
        return torch.empty_like(_inner(tensor), device="meta")
    if there == wanted:
        return tensor
    way: Any = _Upload if wanted else _Download
    moved: Tensor = way.apply(tensor)
    return moved


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to`` in all its forms."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in args:
        if isinstance(value, Tensor):
            device, dtype = _CUDA if isinstance(value, GpuTensor) else "cpu", value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            device = value
    if device is not None:
        tensor = _moved(tensor, torch.device(device))
    return tensor if dtype in (None, tensor.dtype) else tensor.type(dtype)


def _no_numpy(_: Tensor, *__: object) -> None:
    raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")


# What is answered before an operator is reached: for any tensor, and for those over there.
_FOR_ALL: dict[str, Callable[..., Any]] = {
    "to": _to,
    "cpu": lambda t: _moved(t, torch.device("cpu")),
    "cuda": lambda t, *_: _moved(t, _CUDA),
    "pin_memory": lambda t: t,
    "is_pinned": lambda _: True,
}
_FOR_THEIRS: dict[str, Callable[..., Any]] = {
    "numpy": _no_numpy,
    "__array__": _no_numpy,
    "tolist": lambda t: t.inner.tolist(),
    "untyped_storage": lambda t: t.inner.untyped_storage(),
    "new_tensor": lambda t, values, **options: _moved(t.inner.new_tensor(values, **options), _CUDA),
}
_PROPERTIES: Mapping[Any, Callable[[bool], Any]] = {
    Tensor.device.__get__: lambda there: _CUDA if there else None,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda there: there,  # type: ignore[attr-defined]
}


class _Functions(TorchFunctionMode):
    """Answers what asks for a device before an operator is reached."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        there = bool(args) and isinstance(args[0], GpuTensor)
        for getter, answer in _PROPERTIES.items():
            if func == getter and (found := answer(there)) is not None:
                return found
        if isinstance(args[0] if args else None, Tensor):
            if name in _FOR_ALL:
                return _FOR_ALL[name](*args, **kwargs)
            if there and name in _FOR_THEIRS:
                return _FOR_THEIRS[name](*args, **kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            # A new tensor: made here, kept there.
            kwargs["device"] = "cpu"
            made = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
            return GpuTensor(made.detach()).requires_grad_(made.requires_grad)
        return func(*args, **kwargs)


class _Event:
    """What it stands for has happened, at once."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self, _: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: object) -> float:
        return 0.0

    def synchronize(self) -> None:
        pass


class _Stream:
    """Nothing runs beside anything."""

    device = _CUDA

    def __init__(self, *_: object) -> None:
        pass

    def record_event(self) -> "_Event":
        return _Event()

    def wait_event(self, event: object) -> None:
        pass


@contextlib.contextmanager
def _beside(_: object) -> Iterator[None]:
    """The thread that prepares batches pretends as well."""
    with _Functions():
        yield


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """Make ``cuda`` a device that exists, in this thread and in the one that prepares batches.

    Yields:
        Nothing.
    """
    make_generator = torch.Generator
    with pytest.MonkeyPatch.context() as patch, _Functions():
        for name, value in {
            "is_available": lambda: True,
            "is_bf16_supported": lambda *_: True,
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
            "Event": _Event,
            "Stream": _Stream,
            "current_stream": _Stream,
            "stream": _beside,
        }.items():
            patch.setattr(torch.cuda, name, value)
        # Optimisers ask whether a graph is being captured.
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        patch.setattr(torch, "Generator", lambda *_: make_generator())
        patch.setattr(Tensor, "record_stream", lambda *_: None)
        # Also in the threads that decode.
        patch.setattr(Tensor, "pin_memory", lambda t: t)
        yield
