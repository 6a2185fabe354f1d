"""What the training loop takes its batches from: a cache, or a live detector."""

from collections.abc import Generator, Iterable, Mapping
from typing import Protocol

from mfdetr_cache.training.batch import TrainBatch
from mfdetr_cache.training.order import Order
from mfdetr_cache.training.regions import RegionSettings


class Step(Protocol):
    """One optimiser step: the images of this process's share, and what becomes of them.

    Attributes:
        num_images: Images of the step over all processes.
        num_own_images: Images of this process.
        micro_batches: How many micro-batches it was last prepared in; 0 before.
    """

    num_images: int
    num_own_images: int
    micro_batches: int

    def prepare(self, micro_batches: int) -> None:
        """Put the images on the device, unless they are there in so many micro-batches already."""

    @property
    def counts(self) -> Mapping[RegionSettings, int]:
        """Regions of this process; known when the step is prepared."""

    def batches(self, regions: RegionSettings) -> Iterable[TrainBatch]:
        """The micro-batches of a prepared step, the same ones however often they are asked for."""

    def release(self) -> None:
        """Let go of what is on the device."""


class Source(Protocol):
    """Gives one step after the other.

    Attributes:
        order: Which rows each step trains on.
    """

    order: Order

    def steps(self, numbers: range) -> Generator[Step, None, None]:
        """Steps in order, counted from 0, read ahead."""
