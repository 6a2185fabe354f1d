"""How many of the machine's cores a process may use."""

import os


def threads_beside_gpu(most: int) -> int:
    """How many threads of this process may work while its GPU computes.

    Args:
        most: Beyond which more would not help.

    Returns:
        Half of the cores, shared with the other processes that torchrun started here; 1 or more.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(most, cores // 2))
