"""The checksum of chunks one behind the other, from the checksum of each; compiled by numba.

A CRC is linear: that of two stretches is that of the first, carried on over as many zero bytes as
the second has, plus that of the second. So all chunks of an image are checked by one pass over
their bytes, in place of one call for each.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfdetr_cache.ops.numba_compile import compiled

# CRC-32C (Castagnoli), bits reversed.
_POLYNOMIAL = np.uint32(0x82F63B78)
_ONE = np.uint32(1 << 31)


@compiled()
def _times(a: Any, b: Any) -> Any:  # noqa: ANN401
    """Product of two polynomials over GF(2), modulo that of the checksum; bit 31 is the one."""
    product = np.uint32(0)
    for _ in range(32):
        if a & _ONE:
            product ^= b
        a = np.uint32(a << np.uint32(1))
        b = np.uint32((b >> np.uint32(1)) ^ (_POLYNOMIAL if b & np.uint32(1) else np.uint32(0)))
    return product


@compiled()
def checksum_of_joined(checksums: NDArray[np.uint32], sizes: NDArray[np.int64]) -> int:
    """CRC-32C of stretches of bytes one behind the other, from those of each and their sizes."""
    checksum = np.uint32(0)
    for i in range(len(checksums)):
        # x to the power of 8 times the size, by squaring.
        carry, square, left = _ONE, np.uint32(1 << 23), sizes[i]
        while left > 0:
            if left & 1:
                carry = _times(carry, square)
            square = _times(square, square)
            left >>= 1
        checksum = np.uint32(_times(checksum, carry) ^ checksums[i])
    return int(checksum)
