"""Frozen detectors; :func:`load_detector` is the one door to all of them."""

from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.registry import list_detectors, load_detector

__all__ = ["DetectorOptions", "list_detectors", "load_detector"]
