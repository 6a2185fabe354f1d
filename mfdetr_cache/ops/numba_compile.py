"""Compilation of the CPU kernels."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:  # noqa: ANN401
    """Decorator: compile a function when it is first called; it runs without the GIL.

    The machine code is cached beside the package, in the user's cache folder or in
    ``NUMBA_CACHE_DIR``. Where none can be written, as in a read-only container, every process
    compiles again, which takes some seconds. A shared folder such as ``/tmp`` is no alternative:
    whoever may write there could put code into this process.
    """

    def decorate(function: Callable[..., Any]) -> Any:  # noqa: ANN401
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba: "no locator available"
            return numba.njit(nogil=True, **options)(function)

    return decorate
