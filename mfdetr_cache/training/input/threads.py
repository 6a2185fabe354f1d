"""Samples read ahead of the step by threads of this process."""

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
    """The samples of one step after the other.

    Args:
        load: Reads and prepares a row for a step; safe to call from several threads.
        rows_of: Rows of a step.
        steps: Steps to go through.
        num_threads: How many threads.

    Yields:
        What was loaded for a step, in the order of its rows.
    """
    pool = ThreadPoolExecutor(num_threads, "reader")

    def begin(step: int) -> Callable[[], list[LoadedT]]:
        return results_of([pool.submit(load, row, step) for row in rows_of(step)])

    try:
        yield from read_ahead(begin, steps, READ_AHEAD)
    finally:
        pool.shutdown(cancel_futures=True)


def results_of(futures: list[Future[LoadedT]]) -> Callable[[], list[LoadedT]]:
    """What waits for the results of some futures, in their order."""
    return lambda: [future.result() for future in futures]
