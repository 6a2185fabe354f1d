"""The interface between the training loop and its data: a cache or a live detector."""

from collections.abc import Generator, Iterable, Mapping
from typing import Protocol

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
