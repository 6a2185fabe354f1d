"""Masks that a detector gives itself."""

from mfdetr_cache.detectors.amp import AmpDetector
from mfdetr_cache.detectors.class_agnostic import ClassAgnosticDetector
from mfdetr_cache.detectors.protocol import Detector, MaskingDetector


def with_own_masks(detector: Detector) -> MaskingDetector | None:
    """The detector inside of its wrappers, if it gives masks itself."""
    inner: object = detector
    while isinstance(inner, (AmpDetector, ClassAgnosticDetector)):
        inner = inner.detector
    return inner if isinstance(inner, MaskingDetector) else None
