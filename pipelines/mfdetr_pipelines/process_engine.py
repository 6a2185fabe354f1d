"""Parts of a cache, or groups of heads, on a cluster or in several processes on this machine.

A detector on a GPU is started operation by operation: one process leaves the GPU waiting for the
next one, and its threads for each other.
"""

import contextlib
import os
import select
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar

from mfdetr_cache.child_process import start_child
from mfdetr_cache.errors import ConfigError, MfdetrError, StoppedError
from mfdetr_cache.signals import is_stopping
from mfdetr_pipelines.config.shared import WorkOptions
from mfdetr_pipelines.ray_engine import on_cluster

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_START = (
    "import sys; from mfdetr_pipelines.process_engine import serve; serve(*map(int, sys.argv[1:]))"
)


def run_tasks(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], work: WorkOptions, count: int
) -> Iterator[tuple[ItemT, ResultT]]:
    """Run a function for every item, here in ``count`` processes; yields both as they finish.

    What the function raises is raised. ConfigError if a process is ended from outside or the
    cluster cannot be reached, StoppedError on Ctrl-C.
    """
    try:
        if work.engine == "ray":
            yield from on_cluster(function, items, work)
        else:
            yield from in_processes(function, items, count)
    except KeyboardInterrupt:
        raise StoppedError(
            "stopped; what is done is kept, the same command goes on from there"
        ) from None


def in_processes(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], count: int
) -> Iterator[tuple[ItemT, ResultT]]:
    """Of ``run_tasks``; at the end each process gets SIGTERM, also where this one was killed."""
    waiting, count = list(reversed(items)), min(count, len(items))
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            workers.append(_Worker(function, count))  # noqa: PERF401  those before are stopped
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
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.process.wait()


class _Worker:
    def __init__(self, function: Callable[[Any], Any], count: int) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self.process = start_child(_START, [theirs.fileno()], count)
        self.ask(function)

    def ask(self, item: object) -> None:
        with contextlib.suppress(ConnectionError):  # `result` tells
            self.connection.send(item)

    def result(self) -> Any:  # noqa: ANN401
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            code = self.process.wait()
            if code >= 0:  # its traceback has been printed
                raise RuntimeError(f"a process of --workers failed (exit code {code})") from None
            raise ConfigError(
                f"a process of --workers was ended by signal {-code} (9 is mostly a lack of "
                "memory); what is done is kept, the same command goes on, perhaps with fewer "
                "--workers"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def serve(descriptor: int, count: int) -> None:
    """In the process: results for items, until nobody asks any more."""
    connection: Connection[Any, Any] = Connection(descriptor)
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    # As torchrun tells it: cores are shared.
    shared_by = count * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ["LOCAL_WORLD_SIZE"] = str(shared_by)
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    with contextlib.suppress(EOFError, ConnectionError):
        function = connection.recv()
        while True:
            item = connection.recv()
            try:
                answer = function(item)
            except MfdetrError as error:
                answer = error
            except Exception as error:  # a bug gets its traceback, a full GPU its line
                error.add_note(f"in a process of --workers:\n{traceback.format_exc()}")
                answer = error
            connection.send(answer)


def _end_with(connection: Connection) -> None:
    """Stop this process when the one that asks hangs up or is gone: it no longer owns the work."""
    hung_up = select.poll()
    hung_up.register(connection.fileno(), select.POLLHUP)
    hung_up.poll()
    # Whoever is asked twice does not finish what is begun.
    if not is_stopping():
        os.kill(os.getpid(), signal.SIGTERM)
