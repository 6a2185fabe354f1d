"""Parts of a cache, or groups of heads, as Ray tasks on a cluster.

Tasks and not actors: a task whose node dies is run again on any free node, while an actor waits for
a node like its own. Slow initialisation is cached in the worker process, which Ray reuses for later
tasks.
"""

import importlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from mfdetr_cache.errors import ConfigError, MfdetrError
from mfdetr_pipelines.config.shared import WorkOptions

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def on_cluster(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], work: WorkOptions
) -> Iterator[tuple[ItemT, ResultT]]:
    """Run a function for every item as a task; yields items and results as they finish.

    Tasks of a dead node run again, so the function must be idempotent. ConfigError if Ray is not
    installed or the cluster cannot be reached.
    """
    with _connected(work) as ray:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        # As many as were asked for; else twice as many as run, so that no worker waits for work.
        most = work.workers or 2 * (gpus or max(1, cpus // 2))
        needs = {"num_gpus": 1 if gpus else 0, "num_cpus": 1}

        def call(item: ItemT) -> ResultT:
            return function(item)

        task = ray.remote(call).options(max_retries=-1, retry_exceptions=False, **needs)
        waiting = list(reversed(items))
        running: dict[Any, ItemT] = {}
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    item = waiting.pop()
                    running[task.remote(item)] = item
                done, _ = ray.wait(list(running), num_returns=1)
                yield running.pop(done[0]), _result(ray, done[0])
        except KeyboardInterrupt:
            for reference in running:
                ray.cancel(reference)
            raise


def _result(ray: Any, reference: Any) -> Any:  # noqa: ANN401  Ray ships no types for these
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # The reason itself, if it is one a person can act on; else the traceback of the worker.
        if isinstance(error.cause, MfdetrError):
            raise error.cause from None
        raise


@contextmanager
def _connected(work: WorkOptions) -> Iterator[Any]:
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigError(
            "--engine ray: Ray is not installed; pip install 'mfdetr-cache[ray]'"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    ends = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=work.address, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--address {work.address}: no Ray cluster there ({reason})") from error
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler would end the command without a word.
        signal.signal(signal.SIGTERM, ends)
    try:
        yield ray
    finally:
        ray.shutdown()
