"""Quantising a map in two passes over memory, compiled by numba when it is first used.

An image of H-DETR has 14 million values. Array operations pass over them a dozen times and want
them channels last first; here they are read as the detector leaves them, a plane per channel, and a
block's codes stay in the cache until they are written. Without the GIL, on one thread: images are
encoded side by side.
"""

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.ops.numba_compile import compiled

# Tokens whose codes are turned to channels last together; blocks are multiples of it.
_TILE = 64
_NO_FRACTION = np.float32(1.5 * 2**23)
_LARGEST_FLOAT16 = int(np.float32(65504).view(np.int32))


# Extremes may be taken in any order. Codes below are plain IEEE arithmetic: the bytes of a cache
# must not depend on the machine.
@compiled(fastmath={"nsz"})
def block_extremes(
    planes: NDArray[np.float32],
    bits: NDArray[np.int32],
    block: int,
    lowest: NDArray[np.float32],
    highest: NDArray[np.float32],
) -> bool:
    """Minimum and maximum per block and channel of values (C, n), written to arrays (blocks, C).

    Returns whether all values, whose ``bits`` are given too, are finite and in float16's range.
    """
    channels, count = planes.shape
    top = np.int32(0)
    for channel in range(channels):
        for number in range(lowest.shape[0]):
            first = number * block
            length = min(block, count - first)
            values = planes[channel, first : first + length]
            patterns = bits[channel, first : first + length]
            least = largest = values[0]
            for i in range(length):
                value = values[i]
                least = value if value < least else least
                largest = value if value > largest else largest
                # Without their sign, bits rise with the value, to infinity and on to NaN.
                top = max(top, patterns[i] & np.int32(0x7FFFFFFF))
            lowest[number, channel] = least
            highest[number, channel] = largest
    # Below the least float16 ``low`` would be rounded down to infinity.
    return bool(top <= _LARGEST_FLOAT16)


@compiled()
def block_codes(
    planes: NDArray[np.float32],
    block: int,
    low: NDArray[np.float32],
    scale: NDArray[np.float32],
    most: np.float32,
    codes: NDArray[np.uint8],
) -> None:
    """Write the nearest code, ties to even, of every value of (C, n) to ``codes``, shape (n, C).

    ``low`` and ``scale``, both (blocks, C), are the value of code 0 and the step, which is above
    zero; ``most`` is the largest code.
    """
    channels, count = planes.shape
    tile = np.empty((channels, _TILE), np.uint8)
    for first in range(0, count, _TILE):
        length = min(_TILE, count - first)
        number = first // block
        # Rows by name: a vector loop needs to see that their indices begin at zero.
        for channel in range(channels):
            base, step = low[number, channel], scale[number, channel]
            values, row = planes[channel, first : first + length], tile[channel]
            for i in range(length):
                code = (values[i] - base) / step
                code = max(np.float32(0), min(code, most))
                # Without a fraction's bits left, the sum is rounded to an integer, ties to even.
                row[i] = np.uint8(np.int32((code + _NO_FRACTION) - _NO_FRACTION))
        for i in range(length):
            token = codes[first + i]
            for channel in range(channels):
                token[channel] = tile[channel, i]
