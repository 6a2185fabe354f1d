"""Results in order, the next ones begun before they are asked for."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def read_ahead(
    begin: Callable[[ItemT], Callable[[], ResultT]], items: Iterable[ItemT], depth: int
) -> Generator[ResultT, None, None]:
    """The result of each item, in order.

    Args:
        begin: Begins to work on an item, in a thread or a process; returns what waits for the
            result, such as ``Future.result``.
        items: The items.
        depth: How many are being worked on when a result is asked for; one fewer while it is used.

    Yields:
        The results.
    """
    begun: deque[Callable[[], ResultT]] = deque()
    for item in items:
        begun.append(begin(item))
        if len(begun) == depth:
            yield begun.popleft()()
    while begun:
        yield begun.popleft()()
