"""A live detector whose classes are one, as a cache with such labels is read."""

from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor, nn

from mfdetr_cache.coco.class_agnostic import class_agnostic_spec
from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.ops.any_class import any_class
from mfdetr_cache.types import DetectorOutput, DetectorSpec, ImageGeometry


class ClassAgnosticDetector(nn.Module):
    """A detector with one label for all of its classes.

    Args:
        detector: The detector, its classes apart.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        self.spec: DetectorSpec = class_agnostic_spec(detector.spec)

    def input_geometry(self, original_hw: tuple[int, int], shortest_edge: int = 0) -> ImageGeometry:
        """As that of the detector."""
        return self.detector.input_geometry(original_hw, shortest_edge)

    def preprocess(self, image: Image.Image, shortest_edge: int = 0) -> Tensor:
        """As that of the detector."""
        return self.detector.preprocess(image, shortest_edge)

    def forward(self, pixel_values: Tensor, padding_mask: Tensor | None = None) -> DetectorOutput:
        """As that of the detector, with logits of one label."""
        output = self.detector.forward(pixel_values, padding_mask)
        logits = any_class(output.class_logits, self.detector.spec.score_function)
        return replace(output, class_logits=logits)

    def to(self, device: torch.device | str) -> "ClassAgnosticDetector":  # type: ignore[override]
        """The same detector on another device."""
        self.detector = self.detector.to(device)
        return self
