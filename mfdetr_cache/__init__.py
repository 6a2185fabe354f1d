"""Instance masks for any frozen DETR: cache the detector once, train mask networks from the cache."""

__version__ = "0.1.0"
