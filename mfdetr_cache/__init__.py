"""Instance masks for any frozen DETR: cache it once, train mask networks from the cache."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mfdetr_cache.model import MaskFrozenDETR

__all__ = ["MaskFrozenDETR", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # torch, which takes seconds to import, is needed by who asks for the model alone.
    if name != "MaskFrozenDETR":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("mfdetr_cache.model").MaskFrozenDETR
