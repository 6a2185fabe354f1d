"""Readers in processes of their own, which leave the GIL to the training.

Threads that read let go of the GIL for almost everything they do. Yet a training on a GPU, which is
a thousand short calls per step, loses a third of its time to passing it back and forth. Here the
arrays of what is read are put into memory that both sides see; only a few numbers are sent.
"""

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
import torch

from mfdetr_cache.errors import ConfigError, MfdetrError, TrainingError
from mfdetr_cache.ops.devices import keep_freed_memory
from mfdetr_cache.read_ahead import read_ahead
from mfdetr_cache.training.input.threads import READ_AHEAD, LoadedT, results_of

# Arrays shorter than this are sent as they are.
_SHORT = 4096
_ALIGNMENT = 64
# Room for whatever is not maps: queries, targets. What does not fit is sent, only more slowly.
_ROOM_BESIDE_MAPS = 8 * 2**20
_START = (
    "import sys; from mfdetr_cache.training.input.processes import serve; "
    "serve(*map(int, sys.argv[1:]))"
)


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
    """:func:`read_in_threads`, by processes.

    What is yielded lies in shared memory and is valid until two steps later. Processes take some
    seconds to start; threads can read until then.

    Args:
        load: Reads and prepares a row for a step; it is sent to the processes.
        rows_of: Rows of a step.
        steps: Steps to go through.
        num_processes: How many processes.
        batch_size: Most rows of a step.
        largest_maps: Most bytes that the maps of a row take.
        device: A GPU copies from the shared memory by itself.
        threads_meanwhile: How many threads read until the processes are there, and go on, with a
            warning, where one cannot start; 0 waits for them.

    Yields:
        What was loaded for a step, in the order of its rows.

    Raises:
        ConfigError: If this system has no such memory.
        TrainingError: If a process ends by itself.
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
            return results_of([threads.submit(load, row, step) for row in rows])

        try:
            yield from read_ahead(begin, steps, READ_AHEAD)
        finally:
            readers.stop()
            threads.shutdown(cancel_futures=True)


class _Readers:
    """Processes that read, each image into a slot of its own.

    Args:
        processes: They have just been started.
        batch_size: Most rows of a step.
        room: Bytes of a slot.
        are_awaited: Ask them before they listen, too: there is nobody else.
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
        """Whether all of them listen; where one cannot even start, none ever does."""
        if not self._are_there and self._processes:
            try:
                self._are_there = all(p.is_there() for p in self._processes)
            except TrainingError as error:
                warnings.warn(f"threads go on reading: {error}", RuntimeWarning, stacklevel=2)
                self.stop()
        return self._are_there

    def ask(self, rows: list[int], step: int) -> Callable[[], list[Any]]:
        """Have the rows of a step read; returns what waits for them."""
        answers = []
        for number, row in enumerate(rows):
            slot = (step % (READ_AHEAD + 2)) * self._batch_size + number
            # In turn, whatever the size of a batch.
            process = self._processes[self._asked % len(self._processes)]
            answers.append(process.ask(row, step, slot * self._room, self._room))
            self._asked += 1
        return lambda: [answer() for answer in answers]

    def stop(self) -> None:
        """End all of them, whatever they do."""
        for process in self._processes:
            process.stop()
        self._processes = []


class _Reader:
    """A process that reads.

    Args:
        descriptor: Of the shared memory.
        memory: The same memory here.
        load: What it does for a row and a step.
    """

    def __init__(
        self, descriptor: int, memory: memoryview, load: Callable[[int, int], Any]
    ) -> None:
        self._connection, theirs = Pipe()
        self._memory = memory
        self._has_begun = False
        numbers = [theirs.fileno(), descriptor]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, [*numbers, len(memory)])],
            pass_fds=numbers,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        theirs.close()
        self._send(load)

    def is_there(self) -> bool:
        """Whether it has begun to listen."""
        if not self._has_begun and self._connection.poll():
            self._receive()
            self._has_begun = True
        return self._has_begun

    def ask(self, row: int, step: int, first: int, room: int) -> Callable[[], Any]:
        """Have a row read into a stretch of the memory; what gives it, in the order of asking."""
        self._send((row, step, first, room))

        def answer() -> Any:  # noqa: ANN401
            while not self.is_there():
                self._connection.poll(None)
            answer = self._receive()
            if isinstance(answer, Exception):
                raise answer
            data, stretches = answer
            buffers = [self._memory[first + start : first + stop] for start, stop in stretches]
            return pickle.loads(data, buffers=buffers)

        return answer

    def stop(self) -> None:
        """End it, whatever it does."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _receive(self) -> Any:  # noqa: ANN401
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._ended() from error

    def _send(self, message: Any) -> None:  # noqa: ANN401
        try:
            self._connection.send(message)
        except ConnectionError as error:
            raise self._ended() from error

    def _ended(self) -> TrainingError:
        code = self._process.wait()
        return TrainingError(
            f"a process that reads the cache ended by itself (exit code {code}; -9 is mostly a "
            "lack of memory); go on with --resume, perhaps with fewer (--set num_processes=N)"
        )


@contextlib.contextmanager
def _shared_memory(size: int, device: torch.device) -> Iterator[tuple[int, memoryview]]:
    """Memory that other processes may map by its descriptor; for a GPU, which copies from it."""
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
    """What a reading process does, until nobody listens any more.

    Args:
        connection_descriptor: Where it is asked.
        memory_descriptor: Where arrays go.
        size: Bytes of that memory.
    """
    # Ctrl-C reaches every process of a terminal; the one that trains ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    """Its arrays in the memory; everything else, and where they are, as bytes."""
    stretches: list[tuple[int, int]] = []
    end = 0

    def placed(buffer: pickle.PickleBuffer) -> bool:
        """Whether an array has to be sent."""
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
