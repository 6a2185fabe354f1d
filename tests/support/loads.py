"""What reading processes are given to do in tests; they import it by name."""

import os
from typing import Any

import numpy as np

from mfdetr_cache.errors import CacheError


def load(row: int, step: int) -> dict[str, Any]:
    """Arrays short and long, contiguous and not; some rows go wrong."""
    if row == 97:
        raise CacheError("row 97 is damaged")
    if row == 98:
        raise ValueError("a bug")
    if row == 99:
        os._exit(3)
    long = np.arange(20_000, dtype=np.float32) + 1000 * step + row
    return {"row": row, "long": long, "across": long.reshape(100, 200).T, "short": long[:3]}


def load_much(row: int, step: int) -> dict[str, Any]:
    """More than there is room for beside the maps."""
    return {"row": row, "much": np.full(12 * 2**20, row + step, np.uint8)}


def load_where(row: int, step: int) -> dict[str, Any]:
    """Which process does it."""
    return {"row": row, "step": step, "process": os.getpid()}


def _nowhere() -> None:
    raise ValueError("this cannot be set up in another process")


class Unloadable:
    """Works in this process alone."""

    def __call__(self, row: int, step: int) -> dict[str, Any]:
        return load_where(row, step)

    def __reduce__(self) -> Any:
        return _nowhere, ()
