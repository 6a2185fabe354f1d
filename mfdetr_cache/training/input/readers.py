"""Reading samples ahead, in threads, or in processes, which leave the GIL to the training.

Reader threads release the GIL most of the time. Yet a training on a GPU, a thousand short calls per
step, loses a third of its time to passing it back and forth. Processes return arrays in shared
memory; only small messages are sent.
"""

import contextlib
import mmap
import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

import numpy as np
import torch

from mfdetr_cache.child_process import start_child
from mfdetr_cache.errors import ConfigError, MfdetrError, TrainingError
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.read_ahead import read_ahead

LoadedT = TypeVar("LoadedT")

# Steps being read when the next one is asked for; bounds the memory of the reader.
READ_AHEAD = 3
# Arrays shorter than this are sent as they are.
_SHORT = 4096
_ALIGNMENT = 64
# Room for whatever is not maps: queries, targets. What does not fit is sent, only more slowly.
_ROOM_BESIDE_MAPS = 8 * 2**20
_START = (
    "import sys; from mfdetr_cache.training.input.readers import serve; "
    "serve(*map(int, sys.argv[1:]))"
)


def read_in_threads(
    load: Callable[[int, int], LoadedT],
    rows_of: Callable[[int], list[int]],
    steps: range,
    num_threads: int,
) -> Generator[list[LoadedT], None, None]:
    """Yield what ``load(row, step)``, in several threads, gives for each of ``rows_of(step)``."""
    pool = ThreadPoolExecutor(num_threads, "reader")

    def begin(step: int) -> Callable[[], list[LoadedT]]:
        return _results_of([pool.submit(load, row, step) for row in rows_of(step)])

    try:
        yield from read_ahead(begin, steps, READ_AHEAD)
    finally:
        pool.shutdown(cancel_futures=True)


def _results_of(futures: list[Future[LoadedT]]) -> Callable[[], list[LoadedT]]:
    return lambda: [future.result() for future in futures]


def read_in_processes(
    load: Callable[[int, int], LoadedT],
    rows_of: Callable[[int], list[int]],
    steps: range,
    num_processes: int,
    *,
    batch_size: int,
    largest_maps: int,
    device: torch.device,
    threads_meanwhile: int = 0,
) -> Generator[list[LoadedT], None, None]:
    """:func:`read_in_threads`, by processes; Linux only (else ConfigError).

    ``load`` is pickled; what it returned lies in shared memory and is valid until two steps later.
    A row's maps take at most ``largest_maps`` bytes. Processes need some seconds to start;
    ``threads_meanwhile`` threads read until then, and go on, with a warning, where a process cannot
    start. TrainingError if a process ends by itself.
    """
    if not hasattr(os, "memfd_create"):
        raise ConfigError("num_processes needs Linux; leave it at 0 and set num_threads")
    # Those being read, the one in use and the one before it.
    slots = (READ_AHEAD + 2) * batch_size
    room = -(-(largest_maps + _ROOM_BESIDE_MAPS) // mmap.PAGESIZE) * mmap.PAGESIZE
    with _shared_memory(slots * room, device) as (descriptor, memory):
        processes = [_Reader(descriptor, memory, load) for _ in range(num_processes)]
        readers = _Readers(processes, batch_size, room, are_awaited=not threads_meanwhile)
        threads = ThreadPoolExecutor(max(1, threads_meanwhile), "reader")

        def begin(step: int) -> Callable[[], list[LoadedT]]:
            rows = rows_of(step)
            if readers.are_there():
                return readers.ask(rows, step)
            return _results_of([threads.submit(load, row, step) for row in rows])

        try:
            yield from read_ahead(begin, steps, READ_AHEAD)
        finally:
            readers.stop()
            threads.shutdown(cancel_futures=True)


class _Readers:
    """Reader processes; each image is read into a slot of ``room`` bytes of its own.

    With ``are_awaited`` rows are requested before the processes are ready, since no threads read.
    """

    def __init__(
        self, processes: list["_Reader"], batch_size: int, room: int, *, are_awaited: bool
    ) -> None:
        self._processes = processes
        self._batch_size = batch_size
        self._room = room
        self._are_there = are_awaited
        self._asked = 0

    def are_there(self) -> bool:
        """Whether all processes are ready; False for good if one cannot start."""
        if not self._are_there and self._processes:
            try:
                self._are_there = all(p.is_there() for p in self._processes)
            except TrainingError as error:
                warnings.warn(f"threads go on reading: {error}", RuntimeWarning, stacklevel=2)
                self.stop()
        return self._are_there

    def ask(self, rows: list[int], step: int) -> Callable[[], list[Any]]:
        """Request the rows of a step; returns a function that waits for them."""
        answers = []
        for number, row in enumerate(rows):
            slot = (step % (READ_AHEAD + 2)) * self._batch_size + number
            # In turn, whatever the size of a batch.
            process = self._processes[self._asked % len(self._processes)]
            answers.append(process.ask(row, step, slot * self._room, self._room))
            self._asked += 1
        return lambda: [answer() for answer in answers]

    def stop(self) -> None:
        for process in self._processes:
            process.stop()
        self._processes = []


class _Reader:
    def __init__(
        self, descriptor: int, memory: memoryview, load: Callable[[int, int], Any]
    ) -> None:
        self._connection, theirs = Pipe()
        self._memory = memory
        self._has_begun = False
        numbers = [theirs.fileno(), descriptor]
        self._process = start_child(_START, numbers, len(memory))
        theirs.close()
        self._talk(self._connection.send, load)

    def is_there(self) -> bool:
        if not self._has_begun and self._connection.poll():
            self._talk(self._connection.recv)
            self._has_begun = True
        return self._has_begun

    def ask(self, row: int, step: int, first: int, room: int) -> Callable[[], Any]:
        """Request a row, read into ``memory[first : first + room]``; returns what waits for it.

        The returned functions must be called in the order of the requests.
        """
        self._talk(self._connection.send, (row, step, first, room))

        def answer() -> Any:  # noqa: ANN401
            while not self.is_there():
                self._connection.poll(None)
            answer = self._talk(self._connection.recv)
            if isinstance(answer, Exception):
                raise answer
            data, stretches = answer
            buffers = [self._memory[first + start : first + stop] for start, stop in stretches]
            return pickle.loads(data, buffers=buffers)

        return answer

    def stop(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _talk(self, act: Callable[..., Any], *message: object) -> Any:  # noqa: ANN401
        """Send or receive; TrainingError if the process is gone."""
        try:
            return act(*message)
        except (EOFError, ConnectionError) as error:
            code = self._process.wait()
            raise TrainingError(
                f"a process that reads the cache ended by itself (exit code {code}; -9 is mostly a "
                "lack of memory); go on with --resume, perhaps with fewer (--set num_processes=N)"
            ) from error


@contextlib.contextmanager
def _shared_memory(size: int, device: torch.device) -> Iterator[tuple[int, memoryview]]:
    """Shared memory and its file descriptor, pinned where a GPU copies from it."""
    descriptor = os.memfd_create("mfdetr-readers")
    registered = None
    try:
        os.ftruncate(descriptor, size)
        # Closed when the last array in it is gone.
        mapped = mmap.mmap(descriptor, size)
        if device.type == "cuda":
            address = np.frombuffer(mapped, np.uint8).ctypes.data
            with torch.cuda.device(device):
                # Where that fails, copies go through other pinned memory.
                if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0:
                    registered = address
        yield descriptor, memoryview(mapped)
    finally:
        if registered is not None:
            with torch.cuda.device(device):
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaHostUnregister(registered)
        os.close(descriptor)


def serve(connection_descriptor: int, memory_descriptor: int, size: int) -> None:
    """The main function of a reader process; ends with the connection. Takes two descriptors."""
    torch.set_num_threads(1)
    keep_freed_memory()
    connection: Connection[Any, Any] = Connection(connection_descriptor)
    memory = memoryview(mmap.mmap(memory_descriptor, size))
    with contextlib.suppress(EOFError, ConnectionError):
        load = connection.recv()
        connection.send(None)
        while True:
            row, step, first, room = connection.recv()
            try:
                answer = _packed(load(row, step), memory[first : first + room])
            except MfdetrError as error:
                answer = error
            except Exception as error:  # a bug gets its traceback
                error.add_note(f"in a process that reads:\n{traceback.format_exc()}")
                answer = error
            connection.send(answer)


def _packed(loaded: object, memory: memoryview) -> Any:  # noqa: ANN401
    """The pickle of an object and the ranges of its large arrays, which are put into ``memory``."""
    stretches: list[tuple[int, int]] = []
    end = 0

    def placed(buffer: pickle.PickleBuffer) -> bool:
        """Whether an array has to be pickled with the rest."""
        nonlocal end
        raw = buffer.raw()
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        if raw.nbytes < _SHORT or start + raw.nbytes > len(memory):
            return True
        end = start + raw.nbytes
        memory[start:end] = raw
        stretches.append((start, end))
        return False

    data = pickle.dumps(loaded, protocol=5, buffer_callback=placed)
    return data, stretches
