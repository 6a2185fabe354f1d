"""How many CPU cores a process may use."""

import os


def threads_beside_gpu(most: int) -> int:
    """CPU threads to use while the GPU computes, from 1 to ``most``.

    Half of the cores, divided by the number of processes that torchrun started on this machine.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(most, cores // 2))
