"""Parts of a cache, or groups of heads, in several processes on this machine.

A detector on a GPU is started operation by operation: one process leaves the GPU waiting for the
next one, and its threads for each other.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from mfdetr_cache.errors import ConfigError, MfdetrError, StoppedError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def in_processes(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], count: int
) -> Iterator[tuple[ItemT, ResultT]]:
    """Run a function for every item in ``count`` processes; yields both as they finish.

    ConfigError if a process is ended from outside, StoppedError on Ctrl-C: each process then gets
    SIGTERM. A script of a user's that calls this needs a main guard.
    """
    waiting = list(reversed(items))
    workers = [_Worker(function, count) for _ in range(min(count, len(items)))]
    try:
        running: dict[object, tuple[_Worker, ItemT]] = {}
        idle = list(workers)
        while waiting or running:
            while waiting and idle:
                worker, item = idle.pop(), waiting.pop()
                worker.ask(item)
                running[worker.connection] = worker, item
            for connection in wait([worker.connection for worker, _ in running.values()]):
                worker, item = running.pop(connection)
                idle.append(worker)
                yield item, worker.result()
    except KeyboardInterrupt:
        raise StoppedError(
            "stopped; what is done is kept, the same command goes on from there"
        ) from None
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    def __init__(self, function: Callable[[Any], Any], count: int) -> None:
        # A copy of this process would share its threads' locks and its GPU.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function, count), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, item: object) -> None:
        with contextlib.suppress(ConnectionError):  # `result` tells
            self.connection.send(item)

    def result(self) -> Any:  # noqa: ANN401
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            if code > 0:  # its traceback has been printed
                raise RuntimeError(f"a process of --workers failed (exit code {code})") from None
            raise ConfigError(
                f"a process of --workers was ended by signal {-code} (9 is mostly a lack of "
                "memory); what is done is kept, the same command goes on, perhaps with fewer "
                "--workers"
            ) from None
        if isinstance(answer, MfdetrError):
            raise answer
        return answer

    def stop(self) -> None:
        # A process that waits for work ends with its connection.
        self.connection.close()
        self._process.terminate()
        self._process.join()


def _serve(connection: Connection, function: Callable[[Any], Any], count: int) -> None:
    """In the process: results for items, until nobody asks any more."""
    # Ctrl-C reaches every process of a terminal; who asked for the work ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # As torchrun tells it: cores are shared.
    os.environ["LOCAL_WORLD_SIZE"] = str(count)
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            item = connection.recv()
            try:
                answer = function(item)
            except MfdetrError as error:
                answer = error
            connection.send(answer)
