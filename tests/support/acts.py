"""What a process can do; it imports this file and little else."""

import os
import signal
import time
from pathlib import Path

from mfdetr_cache.errors import DatasetError
from mfdetr_cache.signals import stop_on_signals


def act(what: str) -> tuple[str, int]:
    """In a process: its number, or an end of some kind."""
    if what == "refuse":
        raise DatasetError("cannot be used")
    if what == "fail":
        raise ConnectionError("no network")
    if what == "exit":
        os._exit(3)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang up":
        os.kill(os.getpid(), signal.SIGHUP)
    if what == "wait":
        time.sleep(100)
    if what.startswith("/"):
        _finish(Path(what))
    return what.upper(), os.getpid()


def _finish(path: Path) -> None:
    """Write a file in the time there is after a first SIGTERM, as a training its checkpoint."""
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        path.touch()
        time.sleep(0.5)
        path.write_text("finished")
