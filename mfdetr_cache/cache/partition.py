"""The share of a cache that one of several processes fills."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from mfdetr_cache.errors import CacheError

PartT = TypeVar("PartT")


@dataclass(frozen=True, slots=True)
class Partition:
    """Every ``count``-th part of a cache, from 1, for one of several processes that fill it.

    Which parts these are follows from the two numbers alone, so that the processes need nothing in
    common but the cache.
    """

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise CacheError(f"part {self.number}/{self.count}: give K/N with K from 1 to N")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, parts: Sequence[PartT]) -> list[PartT]:
        """Every ``count``-th of a cache's parts, from ``number`` on."""
        return list(parts[self.number - 1 :: self.count])


WHOLE = Partition()


def parse_partition(text: str) -> Partition:
    """A partition as typed; ValueError if it cannot be understood.

    Examples:
        >>> parse_partition("3/16")
        Partition(number=3, count=16)
    """
    number, _, count = text.partition("/")
    if not number.isdigit() or not count.isdigit():
        raise ValueError("write K/N, such as 3/16")
    return Partition(int(number), int(count))


def partition_of_environment() -> Partition:
    """The share of this process among those that torchrun or a Slurm array started.

    The whole cache where there are no others.
    """
    variable = os.environ.get
    if int(variable("WORLD_SIZE", "1")) > 1:
        return Partition(int(variable("RANK", "0")) + 1, int(variable("WORLD_SIZE", "1")))
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        first = int(variable("SLURM_ARRAY_TASK_MIN", "0"))
        step = int(variable("SLURM_ARRAY_TASK_STEP", "1"))
        number = (int(variable("SLURM_ARRAY_TASK_ID", "0")) - first) // step + 1
        return Partition(number, int(variable("SLURM_ARRAY_TASK_COUNT", "1")))
    return WHOLE
