"""Copying the next step to the GPU while the current one is computed."""

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from mfdetr_cache.training.input.source import Step


def staged(
    steps: Generator[Step, None, None], micro_batches: int, device: torch.device
) -> Generator[Step, None, None]:
    """The same steps, each prepared by a thread on a CUDA stream of its own.

    Preparing a step must copy through :func:`to_device`. The first step has ``micro_batches``,
    later ones as many as the step yielded last, which the loop may have split further. A step that
    did not fit into memory beside its predecessor is yielded unprepared.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prepared(micro_batches: int) -> "tuple[Step, torch.cuda.Event | None] | None":
        step = next(steps, None)
        if step is None:
            return None
        event = None
        try:
            with _on(side):
                step.prepare(micro_batches)
                if side is not None:
                    event = side.record_event()
                    # What it was copied from is then free to be read into again.
                    event.synchronize()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        return step, event

    with ThreadPoolExecutor(1, "stager") as pool:
        coming = pool.submit(prepared, micro_batches)
        try:
            while (prepared_step := coming.result()) is not None:
                step, event = prepared_step
                coming = pool.submit(prepared, micro_batches)
                if event is not None:
                    current = torch.cuda.current_stream(device)
                    current.wait_event(event)
                    for tensor in _gpu_tensors([list(step.batches(r)) for r in step.counts]):
                        # Its memory must not be given to the side stream while it is still read.
                        tensor.record_stream(current)
                yield step
                micro_batches = step.micro_batches
        finally:
            # A generator must not be closed while the thread is inside it.
            coming.cancel()
            pool.shutdown()
            steps.close()


@contextmanager
def _on(side: "torch.cuda.Stream | None") -> Iterator[None]:
    if side is None:
        yield
        return
    with torch.cuda.device(side.device), torch.cuda.stream(side):
        yield


def _gpu_tensors(tree: object) -> Iterable[Tensor]:
    """All CUDA tensors in nested dataclasses and containers."""
    if isinstance(tree, Tensor):
        if tree.is_cuda:
            yield tree
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from _gpu_tensors(getattr(tree, field.name))
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _gpu_tensors(value)
