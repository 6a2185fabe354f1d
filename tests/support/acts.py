"""What a process can do; it imports this file and little else."""

import os
import signal

from mfdetr_cache.errors import DatasetError


def act(what: str) -> tuple[str, int]:
    """In a process: its number, or an end of some kind."""
    if what == "refuse":
        raise DatasetError("cannot be used")
    if what == "fail":
        raise ZeroDivisionError("a bug")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return what.upper(), os.getpid()
