"""A frozen detector computed in bfloat16 where that is safe."""

from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor, nn

from mfdetr_cache.detectors.protocol import Detector
from mfdetr_cache.types import DetectorOutput, DetectorSpec, ImageGeometry

# In a detector's settings, and with them in the identity of its caches and heads.
AMP = "amp"


class AmpDetector(nn.Module):
    """A detector under autocast: products and convolutions in bfloat16, weights in float32."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        settings = {**detector.spec.settings, AMP: "bf16"}
        self.spec: DetectorSpec = replace(detector.spec, settings=settings)

    def input_geometry(self, original_hw: tuple[int, int], shortest_edge: int = 0) -> ImageGeometry:
        """As that of the detector."""
        return self.detector.input_geometry(original_hw, shortest_edge)

    def preprocess(self, image: Image.Image, shortest_edge: int = 0) -> Tensor:
        """As that of the detector."""
        return self.detector.preprocess(image, shortest_edge)

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

    def to(self, device: torch.device | str) -> "AmpDetector":  # type: ignore[override]
        """The same detector on another device."""
        self.detector = self.detector.to(device)
        return self
