"""Reading samples ahead in threads."""

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from mfdetr_cache.read_ahead import read_ahead

LoadedT = TypeVar("LoadedT")

# Steps being read when the next one is asked for; bounds the memory of the reader.
READ_AHEAD = 3


def read_in_threads(
    load: Callable[[int, int], LoadedT],
    rows_of: Callable[[int], list[int]],
    steps: range,
    num_threads: int,
) -> Generator[list[LoadedT], None, None]:
    """Yield the loaded rows of each step, in the order of ``rows_of(step)``.

    ``load(row, step)`` is called from several threads.
    """
    pool = ThreadPoolExecutor(num_threads, "reader")

    def begin(step: int) -> Callable[[], list[LoadedT]]:
        return results_of([pool.submit(load, row, step) for row in rows_of(step)])

    try:
        yield from read_ahead(begin, steps, READ_AHEAD)
    finally:
        pool.shutdown(cancel_futures=True)


def results_of(futures: list[Future[LoadedT]]) -> Callable[[], list[LoadedT]]:
    """A function that waits for futures and returns their results in order."""
    return lambda: [future.result() for future in futures]
