"""Python processes that work for this one."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence


def start_child(code: str, descriptors: Sequence[int], *arguments: int) -> subprocess.Popen[bytes]:
    """Run ``code`` in a new Python that keeps these file descriptors and imports what this one can.

    They are its first arguments. Unlike multiprocessing's, it does not run a user's script again.
    """
    command = [sys.executable, "-P", "-c", code, *map(str, [*descriptors, *arguments])]
    path = os.pathsep.join(folder or os.curdir for folder in sys.path)
    # Ctrl-C and a terminal that closes reach every process there; who started this one ends it.
    # What is blocked stays so in a process that is started.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        return subprocess.Popen(
            command, pass_fds=descriptors, env={**os.environ, "PYTHONPATH": path}
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
