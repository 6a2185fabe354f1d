"""How the CPU kernels are compiled."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:  # noqa: ANN401
    """Decorator: compile a function when it is first called; it runs without the GIL.

    The machine code is kept for later processes beside the package, in the user's cache folder or
    in ``NUMBA_CACHE_DIR``. Where none of these can be written, as in a read-only container, every
    process compiles for itself, which takes some seconds. A shared folder such as ``/tmp`` is no
    way out: whoever may write there could put code into this process.

    Args:
        **options: Further options of :func:`numba.njit`.

    Returns:
        The decorator.
    """

    def decorate(function: Callable[..., Any]) -> Any:  # noqa: ANN401
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba: "no locator available"
            return numba.njit(nogil=True, **options)(function)

    return decorate
