"""Reading by our processes and threads against torch's DataLoader: the same samples, in turns.

Every way reads, checks and decompresses images and builds their regions, for steps of a training
with the `fast` recipe's settings. As little as can be crosses between processes: torch's workers
put the arrays of a batch into one shared tensor, and what collates and what unpacks share our way
of pickling. All arrays of a step are copied once by whoever consumes it, as a copy to a device
would. With a GPU, DataLoader pins what it gives, as our processes do.

python benchmarks/dataloader.py [--cache DIR] [--workers 1] [--batch 4] [--steps 12] [--rounds 7]
    [--ways NAME ...]

Without --cache, a made-up one in the geometry of H-DETR R50.
"""

import argparse
import contextlib
import os
import pickle
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry import made_cache
from read_speed import spread
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mfdetr_cache.cache.reader import FeatureCache
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.training.batch import TrainSample
from mfdetr_cache.training.input.loader import Loader
from mfdetr_cache.training.input.readers import READ_AHEAD, read_in_processes, read_in_threads
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cache.training.regions import RegionSettings

Stream = Iterator[list[TrainSample]]
Item = tuple[int, int]  # row and step
Packed = tuple[bytes, list[int], Tensor]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALIGNMENT = 64
SHORT = 4096
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Images(Dataset[TrainSample]):
    """Images by row and step."""

    def __init__(self, load: Loader) -> None:
        self._load = load

    def __getitem__(self, item: Item) -> TrainSample:
        return self._load(*item)


def packed(images: list[TrainSample]) -> Packed:
    """What collates: all arrays in one shared tensor, of which DataLoader sends the name alone."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(images, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    ends = np.cumsum([-(-view.nbytes // ALIGNMENT) * ALIGNMENT for view in views]).tolist()
    shared = torch.UntypedStorage._new_shared(ends[-1])  # as default_collate makes it
    tensor = torch.empty(0, dtype=torch.uint8).set_(shared)
    memory = tensor.numpy().data
    sizes = []
    for start, view in zip([0, *ends], views, strict=False):
        memory[start : start + view.nbytes] = view
        sizes.append(view.nbytes)
    return data, sizes, tensor


def unpacked(batch: Packed) -> list[TrainSample]:
    data, sizes, tensor = batch
    memory, start, buffers = tensor.numpy().data, 0, []
    for size in sizes:
        buffers.append(memory[start : start + size])
        start += -(-size // ALIGNMENT) * ALIGNMENT
    images: list[TrainSample] = pickle.loads(data, buffers=buffers)
    return images


class ImagesInSlots(Dataset[tuple[bytes, list[tuple[int, int]]]]):
    """Images by row, step and slot of a memory that all processes share."""

    def __init__(self, load: Loader, memory: Tensor, room: int) -> None:
        self._load, self._memory, self._room = load, memory, room

    def __getitem__(self, item: tuple[int, int, int]) -> tuple[bytes, list[tuple[int, int]]]:
        row, step, slot = item
        memory = self._memory.numpy().data
        stretches: list[tuple[int, int]] = []
        end = slot * self._room
        last = end + self._room

        def sent(buffer: pickle.PickleBuffer) -> bool:
            nonlocal end
            raw = buffer.raw()
            start = -(-end // ALIGNMENT) * ALIGNMENT
            if raw.nbytes < SHORT or start + raw.nbytes > last:
                return True
            end = start + raw.nbytes
            memory[start:end] = raw
            stretches.append((start, end))
            return False

        return pickle.dumps(self._load(row, step), 5, buffer_callback=sent), stretches


def as_it_is(images: list[TrainSample]) -> list[TrainSample]:
    return images


def quiet_worker(_number: int) -> None:
    """What our processes do when they start, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()


class Work:
    """Steps of a training, and the ways to read them.

    Args:
        path: The cache.
        batch: Images of a step.
        workers: Processes or threads that read.
    """

    def __init__(self, path: Path, batch: int, workers: int) -> None:
        self.cache = FeatureCache.open(path)
        self.batch = batch
        self._workers = workers
        recipe = build_recipe("fast", {"batch_size": str(batch)})
        self._names = tuple(m.name for m in self.cache.spec.maps)
        regions = RegionSettings.of(recipe.train, recipe.head)
        on_gpu = DEVICE.type == "cuda"
        rows = self.cache.rows
        self._load = Loader(
            self.cache, self._names, ("base",), len(rows), 0, (regions,), pinned=on_gpu
        )
        self._order = [rows[int(i)] for i in np.random.default_rng(0).permutation(len(rows))]
        self.ways: dict[str, Callable[[range], Stream]] = {
            "our processes": lambda steps: self._our_processes(steps, 0),
            "our processes, threads until they are there": lambda steps: self._our_processes(
                steps, workers
            ),
            "our threads": lambda steps: read_in_threads(self._load, self.rows_of, steps, workers),
            "DataLoader, batches": lambda steps: self._by_batches(steps, "spawn"),
            "DataLoader, batches, forked": lambda steps: self._by_batches(steps, "fork"),
            "DataLoader, memory that stays": lambda steps: self._in_slots(steps, "spawn"),
            "DataLoader, arrays as they are": lambda steps: self._plain(steps, "spawn"),
            "DataLoader, no worker": lambda steps: self._plain(steps, None),
        }

    def rows_of(self, step: int) -> list[int]:
        """Rows of a step."""
        first = step * self.batch
        return [self._order[(first + i) % len(self._order)] for i in range(self.batch)]

    def items_of(self, step: int) -> list[Item]:
        """The same with the step beside each."""
        return [(row, step) for row in self.rows_of(step)]

    def _our_processes(self, steps: range, threads: int) -> Stream:
        return read_in_processes(
            self._load,
            self.rows_of,
            steps,
            self._workers,
            batch_size=self.batch,
            largest_maps=self.cache.largest_maps(self._names),
            device=DEVICE,
            threads_meanwhile=threads,
        )

    def _workers_of(self, context: str | None, ahead: int) -> dict[str, Any]:
        if context is None:
            return {}
        return {
            "num_workers": self._workers,
            "prefetch_factor": max(1, round(ahead / self._workers)),
            "multiprocessing_context": context,
            "persistent_workers": True,
            "worker_init_fn": quiet_worker,
            "pin_memory": DEVICE.type == "cuda",
        }

    def _by_batches(self, steps: range, context: str) -> Stream:
        """A worker reads a whole step."""
        batches = list(map(self.items_of, steps))
        options = self._workers_of(context, READ_AHEAD)
        loader = DataLoader(Images(self._load), batch_sampler=batches, collate_fn=packed, **options)
        return map(unpacked, loader)

    def _in_slots(self, steps: range, context: str) -> Generator[list[TrainSample], None, None]:
        """Image by image, into memory that is made once, as our processes do it."""
        room = self.cache.largest_maps(self._names) + 8 * 2**20
        count = (READ_AHEAD + 2) * self.batch
        memory = torch.empty(count * room, dtype=torch.uint8).share_memory_()
        if DEVICE.type == "cuda":
            torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0)
        options = self._workers_of(context, READ_AHEAD * self.batch) | {"pin_memory": False}
        items = [item for step in steps for item in self.items_of(step)]
        numbered = [(*item, number % count) for number, item in enumerate(items)]
        dataset = ImagesInSlots(self._load, memory, room)
        loader = DataLoader(
            dataset, batch_size=None, sampler=numbered, collate_fn=as_it_is, **options
        )
        view, images = memory.numpy().data, iter(loader)
        for _ in steps:
            found = [next(images) for _ in range(self.batch)]
            yield [pickle.loads(d, buffers=[view[a:b] for a, b in where]) for d, where in found]

    def _plain(self, steps: range, context: str | None) -> Stream:
        """What is read as DataLoader sends it by itself: numpy arrays go through a pipe."""
        batches = list(map(self.items_of, steps))
        options = self._workers_of(context, READ_AHEAD)
        options.pop("pin_memory", None)
        return iter(
            DataLoader(Images(self._load), batch_sampler=batches, collate_fn=as_it_is, **options)
        )


class Consumer:
    """Copies every array of a step, as a copy to a device would."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.uint8)
        self.bytes = 0

    def __call__(self, images: list[TrainSample]) -> None:
        """Copy a step's arrays."""
        for image in images:
            for stored in image.image.maps.values():
                for array in (stored.values, stored.affine):
                    if array is not None:
                        self._copy(array)
            for regions in image.regions.values():
                self._copy(regions.masks)

    def _copy(self, array: np.ndarray[Any, Any]) -> None:
        if len(self._room) < array.nbytes:
            self._room = np.empty(array.nbytes, np.uint8)
        np.copyto(self._room[: array.nbytes].view(array.dtype), array.reshape(-1))
        self.bytes += array.nbytes


def family(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            number = int(entry.name)
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(number)
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def spent(pids: list[int]) -> tuple[float, int]:
    """CPU seconds and page faults of some processes."""
    seconds, faults = 0.0, 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
            faults += int(fields[7])
    return seconds, faults


def until_idle(pids: list[int]) -> None:
    """Wait until everything that is read ahead is there."""
    last = -1.0
    while (now := spent(pids)[0]) > last:
        last = now
        time.sleep(0.3)


class Running:
    """A way that has been started.

    Attributes:
        first: Seconds until its first step was there.
        pids: Its processes.
    """

    def __init__(self, start: Callable[[range], Stream], consume: Consumer) -> None:
        others = set(family(os.getpid()))
        started = time.perf_counter()
        self._consume = consume
        self._stream = start(range(10**4))
        consume(next(self._stream))
        self.first = time.perf_counter() - started
        self.pids = [os.getpid(), *(set(family(os.getpid())) - others)]

    def turn(self, steps: int) -> tuple[float, float, float]:
        """Seconds, CPU seconds and page faults of a step, read ahead at both ends alike."""
        until_idle(self.pids)
        before = spent(self.pids)
        for number in range(READ_AHEAD + steps):
            if number == READ_AHEAD:  # what follows had not been read when the turn began
                started = time.perf_counter()
            self._consume(next(self._stream))
        seconds = time.perf_counter() - started
        until_idle(self.pids)
        after = spent(self.pids)
        total = READ_AHEAD + steps
        return seconds / steps, (after[0] - before[0]) / total, (after[1] - before[1]) / total

    def stop(self) -> None:
        """End its processes."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()
        del self._stream


def print_speeds(work: Work, names: list[str], rounds: int, steps: int) -> None:
    consume = Consumer()
    running = {name: Running(work.ways[name], consume) for name in names}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[:: 1 if turn % 2 else -1]:
            numbers = running[name].turn(steps)
            if turn:  # the first one warms up
                found[name].append(numbers)
    print(
        "| | first step, s | images/s | speed over ours | CPU ms an image | "
        "our CPU over its | page faults an image |"
    )
    print("|---|---|---|---|---|---|---|")
    ours = found[names[0]]
    for name in names:
        wall, cpu, faults = np.median(found[name], axis=0) / work.batch
        pairs = list(zip(ours, found[name], strict=True))
        print(
            f"| {name} | {running[name].first:.1f} | {1 / wall:.1f} | "
            f"{spread(sorted(o[0] / t[0] for o, t in pairs))} | {1e3 * cpu:.1f} | "
            f"{spread(sorted(o[1] / max(t[1], 1e-9) for o, t in pairs))} | {faults:.0f} |",
            flush=True,
        )
    for way in running.values():
        way.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12, help="of each turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", nargs="+", help="names; the first is what others are compared to")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        path = options.cache or made_cache(Path(scratch) / "a.zarr", "int8", images=options.images)
        work = Work(path, options.batch, options.workers)
        print_speeds(work, options.ways or list(work.ways), options.rounds, options.steps)


if __name__ == "__main__":
    main()
