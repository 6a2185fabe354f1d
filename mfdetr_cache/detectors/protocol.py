"""The interface of a detector."""

from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from mfdetr_cache.types import DetectorOutput, DetectorSpec, ImageGeometry


@runtime_checkable
class Detector(Protocol):
    """A frozen detector: from an image to queries, boxes, class logits and feature maps.

    For a detector without queries each of its final detections is one, with one label; the rest of
    ``spec.num_queries`` is absent, see :class:`~mfdetr_cache.types.DetectorOutput`.

    An implementation is in evaluation mode, its parameters need no gradient, and its output for an
    image does not depend on the rest of the batch.
    """

    @property
    def spec(self) -> DetectorSpec:
        """What this detector is and gives."""

    def input_geometry(self, original_hw: tuple[int, int], shortest_edge: int = 0) -> ImageGeometry:
        """Sizes of an image of height and width ``original_hw`` after preprocessing.

        ``shortest_edge`` is the shorter side of the input in multi-scale views; 0 for the
        detector's own, and ignored where the input size is fixed.
        """

    def preprocess(self, image: Image.Image, shortest_edge: int = 0) -> Tensor:
        """The network input of one RGB image, float32, shape (3, H, W), without padding."""

    def forward(self, pixel_values: Tensor, padding_mask: Tensor | None = None) -> DetectorOutput:
        """Run the frozen detector on preprocessed images, shape (B, 3, H, W).

        ``padding_mask`` is True where a pixel is padding, shape (B, H, W); None for no padding.
        """

    def to(self, device: torch.device | str) -> "Detector":
        """Move to a device; returns the detector."""


def fixed_input_hw(detector: Detector) -> tuple[int, int] | None:
    """Height and width of a detector's only input size; None where it follows the image."""
    images_hw = ((64, 64), (64, 96), (96, 64), (100, 100))
    sizes = {detector.input_geometry(image_hw).input_hw for image_hw in images_hw}
    return sizes.pop() if len(sizes) == 1 else None


@runtime_checkable
class MaskingDetector(Detector, Protocol):
    """A detector that was trained to give masks itself: what a head is measured beside."""

    def own_masks(self, output: DetectorOutput, input_hw: tuple[int, int]) -> Tensor:
        """Mask logits of every query over the whole input, shape (B, Q, h, w).

        ``output`` is what ``forward`` gave for inputs of size ``input_hw``.
        """


@runtime_checkable
class TunableDetector(Detector, Protocol):
    """A detector that can be trained on together with a mask network (Table 16).

    With parameters that need a gradient, its ``forward`` gives outputs that carry one.
    """

    def tunable_parameters(self, part: Literal["encoder-decoder", "all"]) -> list[nn.Parameter]:
        """Parameters for a joint training, always in the same order."""

    def save_weights(self, folder: Path) -> str:
        """Write the current weights into a folder; returns the value for ``--weights``."""
