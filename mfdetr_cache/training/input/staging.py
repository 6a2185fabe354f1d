"""The next batch on its way to the GPU while this one is computed."""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

LoadedT = TypeVar("LoadedT")
BuiltT = TypeVar("BuiltT")


def overlaps(device: torch.device) -> bool:
    """Whether copying and decoding can go on beside computing: a CPU would only share its cores.

    Args:
        device: Where the batches go.

    Returns:
        True on a GPU.
    """
    return device.type == "cuda"


def staged(
    stream: Generator[LoadedT, None, None],
    build: Callable[[LoadedT], BuiltT],
    device: torch.device,
) -> Generator[tuple[LoadedT, Callable[[], BuiltT]], None, None]:
    """Loaded samples and what gives their batch.

    On a GPU the batch after the one that is yielded is read, copied from pinned memory and decoded
    in a thread and a CUDA stream of its own. Elsewhere it is built when asked for.

    Args:
        stream: Samples of one step after the other.
        build: Makes the batch; for a GPU it must copy through :func:`to_device`.
        device: Where the batches go.

    Yields:
        Samples, and a function that gives their batch, ready for the current stream.
    """
    if not overlaps(device):
        for loaded in stream:
            yield loaded, lambda loaded=loaded: build(loaded)  # type: ignore[misc]
        return
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prepare() -> tuple[LoadedT, BuiltT, Any] | None:
        loaded = next(stream, None)
        if loaded is None:
            return None
        with _on(side):
            built = build(loaded)
            event = None if side is None else side.record_event()
            if event is not None:
                # What it was copied from is free to be read into again.
                event.synchronize()
        return loaded, built, event

    with ThreadPoolExecutor(1, "stager") as pool:
        try:
            coming = pool.submit(prepare)
            while (ready := coming.result()) is not None:
                coming = pool.submit(prepare)
                loaded, built, event = ready
                if event is not None:
                    current = torch.cuda.current_stream(device)
                    current.wait_event(event)
                    for tensor in filter(_on_gpu, _tensors(built)):
                        # Its memory must not be given to the side stream while it is still read.
                        tensor.record_stream(current)
                yield loaded, lambda built=built: built  # type: ignore[misc]
        finally:
            # The generator must not be closed while the thread is inside it.
            coming.cancel()
            pool.shutdown()
            stream.close()


@contextmanager
def _on(side: "torch.cuda.Stream | None") -> Iterator[None]:
    if side is None:
        yield
        return
    with torch.cuda.device(side.device), torch.cuda.stream(side):
        yield


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _tensors(found: object) -> Iterable[Tensor]:
    """Every tensor in nested dataclasses and containers."""
    if isinstance(found, Tensor):
        yield found
    elif is_dataclass(found):
        for field in fields(found):
            yield from _tensors(getattr(found, field.name))
    elif isinstance(found, dict):
        for value in found.values():
            yield from _tensors(value)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _tensors(value)
