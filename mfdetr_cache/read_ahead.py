"""Results in order, the next ones begun before they are asked for."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def read_ahead(
    begin: Callable[[ItemT], Callable[[], ResultT]], items: Iterable[ItemT], depth: int
) -> Generator[ResultT, None, None]:
    """The result of each item, in order, ``depth`` items at a time.

    ``begin`` begins to work on an item, in a thread or a process, and returns what waits for
    the result, such as ``Future.result``. One item fewer is worked on while a result is used.
    """
    begun: deque[Callable[[], ResultT]] = deque()
    for item in items:
        begun.append(begin(item))
        if len(begun) == depth:
            yield begun.popleft()()
    while begun:
        yield begun.popleft()()
