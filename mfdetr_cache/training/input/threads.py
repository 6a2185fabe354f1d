"""Batches prepared ahead of the step by threads of this process."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

from mfdetr_cache.training.batch import READ_AHEAD, LoadedT


def read_ahead(
    load: Callable[[int, int], LoadedT],
    rows_of: Callable[[int], list[int]],
    steps: range,
    num_threads: int,
) -> Generator[list[LoadedT], None, None]:
    """The samples of one step after the other, prepared in threads of this process.

    Args:
        load: Reads and prepares a row for a step; safe to call from several threads.
        rows_of: Rows of a step.
        steps: Steps to go through.
        num_threads: How many threads.

    Yields:
        What was loaded for a step, in the order of its rows.
    """
    with ThreadPoolExecutor(num_threads, "reader") as pool:
        ahead: deque[list[Future[LoadedT]]] = deque()
        coming = iter(steps)
        try:
            while True:
                while len(ahead) < READ_AHEAD:
                    step = next(coming, None)
                    if step is None:
                        break
                    ahead.append([pool.submit(load, row, step) for row in rows_of(step)])
                if not ahead:
                    return
                yield [future.result() for future in ahead.popleft()]
        finally:
            for futures in ahead:
                for future in futures:
                    future.cancel()
