"""Instance masks for any frozen DETR: cache it once, train mask networks from the cache."""

__version__ = "0.1.0"
