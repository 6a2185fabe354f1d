"""Asking a command to stop."""

import os
import signal
from collections.abc import Callable


def stop_after(steps: int) -> Callable[[int], None]:
    """A hook for ``on_step`` by which SIGTERM comes once so many steps are done."""

    def on_step(done: int) -> None:
        if done == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step
