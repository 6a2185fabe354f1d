"""What this project needs of a detector."""

from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from mfdetr_cache.types import DetectorOutput, DetectorSpec, ImageGeometry


@runtime_checkable
class Detector(Protocol):
    """A frozen DETR: an image becomes queries, boxes, class logits and feature maps.

    An implementation is in evaluation mode, its parameters need no gradient, and what it computes
    for an image does not depend on what else is in the batch.
    """

    @property
    def spec(self) -> DetectorSpec:
        """What this detector is and gives."""

    def input_geometry(self, original_hw: tuple[int, int], shortest_edge: int = 0) -> ImageGeometry:
        """Sizes an image of the given size gets on its way into the network.

        Args:
            original_hw: Height and width of the image in pixels.
            shortest_edge: Shorter side of the input for multi-scale views; 0 for the detector's
                own, and without effect where the input has one fixed size.

        Returns:
            The geometry.
        """

    def preprocess(self, image: Image.Image, shortest_edge: int = 0) -> Tensor:
        """The network input of one RGB image, float32, shape (3, H, W), without padding.

        Args:
            image: An RGB image at its original size.
            shortest_edge: As in :meth:`input_geometry`.

        Returns:
            float32, shape (3, H, W).
        """

    def forward(self, pixel_values: Tensor, padding_mask: Tensor | None = None) -> DetectorOutput:
        """Run the frozen detector.

        Args:
            pixel_values: Preprocessed images, shape (B, 3, H, W).
            padding_mask: True where a pixel is padding, shape (B, H, W); None for no padding.

        Returns:
            Logits, boxes, queries and maps.
        """

    def to(self, device: torch.device | str) -> "Detector":
        """The same detector on another device.

        Args:
            device: Where to compute.

        Returns:
            The detector.
        """


def fixed_input_hw(detector: Detector) -> tuple[int, int] | None:
    """The input size of a detector that has only one.

    Args:
        detector: The detector.

    Returns:
        Height and width; None where the size follows the image.
    """
    images_hw = ((64, 64), (64, 96), (96, 64), (100, 100))
    sizes = {detector.input_geometry(image_hw).input_hw for image_hw in images_hw}
    return sizes.pop() if len(sizes) == 1 else None


@runtime_checkable
class TunableDetector(Detector, Protocol):
    """A detector that can be trained on together with a mask network (Table 16).

    With parameters that need a gradient, its ``forward`` gives outputs that carry one.
    """

    def tunable_parameters(self, part: Literal["encoder-decoder", "all"]) -> list[nn.Parameter]:
        """Parameters that a joint training may change.

        Args:
            part: Everything but the backbone, or everything.

        Returns:
            The parameters, always in the same order.
        """

    def save_weights(self, folder: Path) -> str:
        """Write the weights as they are now.

        Args:
            folder: Where to.

        Returns:
            What to pass as ``--weights`` to load them.
        """
