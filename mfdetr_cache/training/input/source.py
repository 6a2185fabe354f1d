"""The interface between the training loop and its data: a cache or a live detector.

The next step can be copied to the GPU while the current one is computed.
"""

from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Protocol

import torch
from torch import Tensor

from mfdetr_cache.training.batch import TrainBatch
from mfdetr_cache.training.order import Order
from mfdetr_cache.training.regions import RegionSettings


class Step(Protocol):
    """One optimiser step: this process's share of the images.

    Attributes:
        num_images: Over all processes.
        num_own_images: Of this process.
        micro_batches: Number it was last prepared with; 0 before.
    """

    num_images: int
    num_own_images: int
    micro_batches: int

    def prepare(self, micro_batches: int) -> None:
        """Copy the images to the device, unless they are there in as many micro-batches."""

    @property
    def counts(self) -> Mapping[RegionSettings, int]:
        """Number of this process's regions; known once the step is prepared."""

    def batches(self, regions: RegionSettings) -> Iterable[TrainBatch]:
        """The micro-batches of a prepared step; can be called repeatedly."""

    def release(self) -> None:
        """Free the memory on the device."""


class Source(Protocol):
    """An iterable of training steps; ``order`` gives the rows of each."""

    order: Order

    def steps(self, numbers: range) -> Generator[Step, None, None]:
        """Steps in order, counted from 0, read ahead."""


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
            with nullcontext() if side is None else torch.cuda.stream(side):
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


def _gpu_tensors(tree: object) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        if tree.is_cuda:
            yield tree
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from _gpu_tensors(getattr(tree, field.name))
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _gpu_tensors(value)
