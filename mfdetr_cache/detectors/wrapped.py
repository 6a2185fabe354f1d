"""Detectors around another one: computed in bfloat16, or with one label for all classes."""

from dataclasses import replace
from typing import Self

import torch
from PIL import Image
from torch import Tensor, nn

from mfdetr_cache.coco.class_agnostic import class_agnostic_spec
from mfdetr_cache.detectors.protocol import Detector, MaskingDetector
from mfdetr_cache.ops.any_class import any_class
from mfdetr_cache.types import DetectorOutput, DetectorSpec, ImageGeometry

# In a detector's settings, and with them in the identity of its caches and heads.
AMP = "amp"


class WrappedDetector(nn.Module):
    """A detector with another spec and other outputs; its input is that of the one inside."""

    def __init__(self, detector: Detector, spec: DetectorSpec) -> None:
        super().__init__()
        self.detector = detector
        self.spec = spec

    def input_geometry(self, original_hw: tuple[int, int], shortest_edge: int = 0) -> ImageGeometry:
        """As that of the detector."""
        return self.detector.input_geometry(original_hw, shortest_edge)

    def preprocess(self, image: Image.Image, shortest_edge: int = 0) -> Tensor:
        """As that of the detector."""
        return self.detector.preprocess(image, shortest_edge)

    def to(self, device: torch.device | str) -> Self:  # type: ignore[override]
        """The same detector on another device."""
        self.detector = self.detector.to(device)
        return self


class AmpDetector(WrappedDetector):
    """A detector under autocast: products and convolutions in bfloat16, weights in float32."""

    def __init__(self, detector: Detector) -> None:
        settings = {**detector.spec.settings, AMP: "bf16"}
        super().__init__(detector, replace(detector.spec, settings=settings))

    def forward(self, pixel_values: Tensor, padding_mask: Tensor | None = None) -> DetectorOutput:
        """As that of the detector, rounded; the outputs are float32."""
        with torch.autocast(pixel_values.device.type, torch.bfloat16):
            output = self.detector.forward(pixel_values, padding_mask)
        return DetectorOutput(
            output.class_logits.float(),
            output.boxes_cxcywh_norm.float(),
            output.queries.float(),
            {name: values.float() for name, values in output.maps.items()},
        )


class ClassAgnosticDetector(WrappedDetector):
    """A detector with one label for all of its classes, as a cache with such labels is read."""

    def __init__(self, detector: Detector) -> None:
        super().__init__(detector, class_agnostic_spec(detector.spec))

    def forward(self, pixel_values: Tensor, padding_mask: Tensor | None = None) -> DetectorOutput:
        """As that of the detector, with logits of one label."""
        output = self.detector.forward(pixel_values, padding_mask)
        logits = any_class(output.class_logits, self.detector.spec.score_function)
        return replace(output, class_logits=logits)


def with_own_masks(detector: Detector) -> MaskingDetector | None:
    """The detector inside of its wrappers, if it gives masks itself."""
    inner: object = detector
    while isinstance(inner, WrappedDetector):
        inner = inner.detector
    return inner if isinstance(inner, MaskingDetector) else None
