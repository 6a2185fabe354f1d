"""Data-parallel training in several processes."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from mfdetr_cache.errors import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of a training.

    Gradients are summed by hand and not by ``DistributedDataParallel``: a process whose images have
    no region has no backward pass to hook into, and three million gradients fit into one message.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes, logs and validates."""
        return self.rank == 0

    def share_of(self, items: Sequence[Item]) -> list[Item]:
        """This process's consecutive share of the items of a step."""
        return split(items, self.world)[self.rank]

    def gather(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """The integers of every process, by rank; all pass equally many."""
        if self.world == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64, device=device)
        gathered = [torch.empty_like(mine) for _ in range(self.world)]
        distributed.all_gather(gathered, mine)
        return [[int(v) for v in one] for one in gathered]

    def sum_gradients(self, parameters: Iterable[nn.Parameter], extra: Tensor) -> Tensor:
        """Replace gradients by their sum over all processes; returns the sum of ``extra``, (N,)."""
        if self.world == 1:
            return extra
        parameters = [p for p in parameters if p.requires_grad]
        pieces = [
            p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters
        ]
        flat = torch.cat([extra.to(pieces[0].dtype), *pieces])
        distributed.all_reduce(flat)
        place = len(extra)
        for parameter in parameters:
            count = parameter.numel()
            parameter.grad = flat[place : place + count].view_as(parameter).clone()
            place += count
        return flat[: len(extra)]

    def wait(self) -> None:
        """Wait for all processes (a barrier)."""
        if self.world > 1:
            distributed.barrier()


def split(items: Sequence[Item], count: int) -> list[list[Item]]:
    """Consecutive pieces whose lengths differ by one at most; some may be empty.

    >>> split([1, 2, 3, 4, 5], 2)
    [[1, 2, 3], [4, 5]]
    """
    return [[items[i] for i in piece] for piece in np.array_split(np.arange(len(items)), count)]


@contextmanager
def training_processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes started by ``torchrun`` (or Slurm with its variables), if any.

    The backend is nccl on a GPU, else gloo. ConfigError if the environment variables are
    incomplete.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world} and {', '.join(missing)} is not set; start several processes "
            "with torchrun"
        )
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), world)
    finally:
        distributed.destroy_process_group()
