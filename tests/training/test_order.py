from typing import Any

import numpy as np
import pytest

from mfdetr_cache.errors import HeadError
from mfdetr_cache.training.input.readers import read_in_threads
from mfdetr_cache.training.order import Order, epoch_order, epoch_order_by_parts, view_of_epoch


def test_every_image_once_per_epoch() -> None:
    order = Order(tuple(range(10, 30)), 8, 5)
    assert order.steps_per_epoch == 3
    for epoch in range(2):
        seen = [row for s in range(3) for row in order.rows_of(3 * epoch + s)]
        assert sorted(seen) == list(order.rows)
    assert (epoch_order(20, 5, 0) != epoch_order(20, 5, 1)).any()
    assert (epoch_order(20, 5, 0) != epoch_order(20, 6, 0)).any()


def test_reading_ahead_keeps_order_and_reports_errors() -> None:
    def load(row: int, step: int) -> Any:
        if row == 7:
            raise HeadError("row 7")
        return (row, step)

    steps = list(read_in_threads(load, lambda s: [s, s + 1], range(3), 2))
    assert steps == [[(0, 0), (1, 0)], [(1, 1), (2, 1)], [(2, 2), (3, 2)]]
    with pytest.raises(HeadError, match="row 7"):
        list(read_in_threads(load, lambda s: [s], range(9), 2))


def test_an_epoch_walks_through_the_views() -> None:
    """Every image once per epoch, in another view each time until all were shown."""
    views = ("base", "a", "b", "c")
    for row in range(20):
        shown = [view_of_epoch(views, 0, row, epoch) for epoch in range(8)]
        assert sorted(shown[:4]) == sorted(shown[4:]) == sorted(views)
    first = [view_of_epoch(views, 0, row, 0) for row in range(200)]
    # Views are mixed inside an epoch: about fifty images of each.
    assert all(30 < first.count(v) < 70 for v in views)
    assert first != [view_of_epoch(views, 1, row, 0) for row in range(200)]


def test_parts_are_mixed_and_every_image_comes_once() -> None:
    """Forty parts of fifty rows: neighbours in time come from eight parts, evenly."""
    parts = tuple(row // 50 for row in range(2000))
    order = epoch_order_by_parts(parts, 0, 0)
    assert sorted(order) == list(range(2000))
    assert (order != epoch_order_by_parts(parts, 0, 1)).any()
    window = np.array(parts)[order[:400]]
    assert len(np.unique(window)) == 8
    # Mixed inside the window: the first half of it already holds about half of each part
    # (hypergeometric, standard deviation 3.3; six of them).
    counts = np.array([(window[:200] == p).sum() for p in np.unique(window)])
    assert (abs(counts - 25) < 20).all()
    runs = int((np.diff(window) == 0).sum())
    # In a random order one neighbour in eight is of the same part.
    assert runs < 100
