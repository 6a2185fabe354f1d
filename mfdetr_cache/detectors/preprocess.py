"""Preprocessing of an RGB image, as the detector's authors do it.

PIL's antialiasing differs from tensor interpolation; a detector trained with one loses accuracy
with the other. PIL is the resize of all but mmdetection's, which is OpenCV's; torchvision's
detectors bring their own.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mfdetr_cache.errors import DetectorError
from mfdetr_cache.types import ImageGeometry


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize, rescale and normalise.

    Attributes:
        height: Fixed input height; None to keep the aspect ratio.
        width: Fixed input width; None to keep the aspect ratio.
        shortest_edge: Target of the shorter side when the aspect ratio is kept.
        longest_edge: Bound of the longer side when the aspect ratio is kept.
        resample: PIL's number of the interpolation (2 is bilinear).
        rescale: Factor on the 8-bit values.
        mean: Subtracted per channel after rescaling; None for no normalisation.
        std: Divided by per channel.
        resize: Whose code resizes. PIL with the sizes of the DETRs' authors, PIL with detectron2's
            sizes, or mmcv: OpenCV's bilinear interpolation.
        pads: The image keeps its shape inside height and width, and is padded to them.
        pad_value: Grey of the padding, on the 8-bit values, where the detector attends to it; None
            where it is masked.
        pad_multiple: What the sides are padded to a multiple of where the aspect ratio is kept.
    """

    height: int | None
    width: int | None
    shortest_edge: int | None
    longest_edge: int | None
    resample: int
    rescale: float
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    resize: Literal["PIL", "detectron2", "mmcv"] = "PIL"
    pads: bool = False
    pad_value: float | None = None
    pad_multiple: int = 1

    @classmethod
    def from_processor(cls, processor: dict[str, Any], where: str) -> "Preprocessing":
        """The steps of a transformers ``preprocessor_config.json``; DetectorError for others."""
        size = dict(processor.get("size") or {})
        fixed = processor.get("do_resize", True) and {"height", "width"} <= size.keys()
        edges = (
            processor.get("do_resize", True) and {"shortest_edge", "longest_edge"} <= size.keys()
        )
        padded = dict(processor.get("pad_size") or {}) if processor.get("do_pad") else {}
        # As transformers' own example of fine-tuning writes it.
        pads = processor.get("do_resize", True) and padded == {
            "height": size.get("max_height"),
            "width": size.get("max_width"),
        }
        if pads:
            size, fixed = padded, True
        elif not (fixed or edges) or padded not in ({}, size):
            to = f" and padding to {padded}" if padded else ""
            raise DetectorError(f"{where}: cannot follow its image processor's resize {size}{to}")
        normalise = bool(processor.get("do_normalize", False))
        mean = _of_channels(processor["image_mean"]) if normalise else None
        std = _of_channels(processor["image_std"]) if normalise else None
        return cls(
            height=int(size["height"]) if fixed else None,
            width=int(size["width"]) if fixed else None,
            shortest_edge=None if fixed else int(size["shortest_edge"]),
            longest_edge=None if fixed else int(size["longest_edge"]),
            resample=int(processor.get("resample", 2)),
            rescale=float(processor.get("rescale_factor", 1 / 255))
            if processor.get("do_rescale", True)
            else 1.0,
            mean=mean,
            std=std,
            pads=pads,
        )

    def with_size(self, sides: Sequence[int]) -> "Preprocessing":
        """With another ``--input-size``, if any; DetectorError if its sides are the wrong way."""
        if not sides:
            return self
        if self.height is not None:
            return replace(self, height=sides[0], width=sides[-1])
        shortest, longest = sides_to_fit(sides, self.longest_edge or 0)
        return replace(self, shortest_edge=shortest, longest_edge=longest)

    def to_dict(self) -> dict[str, object]:
        """The settings as plain values, for a cache's identity."""
        found = {"resize": self.resize, **asdict(self)}
        # As before there were such settings.
        if not self.pads:
            del found["pads"]
        if self.pad_value is None:
            del found["pad_value"]
        if self.pad_multiple == 1:
            del found["pad_multiple"]
        return found

    def input_geometry(self, original_hw: tuple[int, int], shortest_edge: int = 0) -> ImageGeometry:
        """Sizes of an image; padded only where the detector's training did that with all images.

        ``shortest_edge`` replaces the target of the shorter side unless it is 0 or the input size
        is fixed.
        """
        if self.height is not None and self.width is not None:
            resized = (self.height, self.width)
            if self.pads:
                fitted = size_that_fits(original_hw, resized)
                if self.resize == "mmcv":
                    fitted = mmcv_size(original_hw, *resized)
                return ImageGeometry(original_hw, fitted, resized)
        else:
            assert self.shortest_edge is not None
            assert self.longest_edge is not None
            edge = shortest_edge or self.shortest_edge
            resized = _SIZES[self.resize](original_hw, edge, self.longest_edge)
        height, width = (-(-side // self.pad_multiple) * self.pad_multiple for side in resized)
        return ImageGeometry(original_hw, resized, (height, width))

    def __call__(self, image: Image.Image, shortest_edge: int = 0) -> Tensor:
        """The network input of one RGB image, float32, shape (3, H, W); NaN stands for padding."""
        geometry = self.input_geometry((image.height, image.width), shortest_edge)
        height, width = geometry.resized_hw
        if self.resize == "mmcv" and (image.height, image.width) != (height, width):
            array = opencv_bilinear(np.asarray(image), (height, width))
        else:
            if (image.height, image.width) != (height, width):
                image = image.resize((width, height), Image.Resampling(self.resample))
            array = np.array(image)
        # Planes before arithmetic, which then goes over memory in order.
        values = torch.empty(3, height, width)
        values.copy_(torch.from_numpy(array).permute(2, 0, 1))
        self.normalised(values)
        if self.pads or self.pad_multiple > 1:
            padded = torch.full((3, *geometry.input_hw), float("nan"))
            padded[:, :height, :width] = values
            return padded
        return values

    def normalised(self, values: Tensor) -> Tensor:
        """8-bit values, shape (3, H, W), rescaled and normalised in place; returns them."""
        # Division, not multiplication by the reciprocal, where the factor is 1/255: that is what
        # the detectors' own code does, and the two differ in the last bit.
        if abs(self.rescale * 255 - 1) < 1e-6:
            values.div_(255)
        else:
            values.mul_(self.rescale)
        if self.mean is not None and self.std is not None:
            mean, std = values.new_tensor(self.mean), values.new_tensor(self.std)
            values.sub_(mean[:, None, None]).div_(std[:, None, None])
        return values


@contextlib.contextmanager
def with_enough_cells(pixel_values: Tensor) -> Iterator[None]:
    """DetectorError where a detector chooses more queries than its maps of an input have cells."""
    try:
        yield
    except RuntimeError as error:
        if "selected index k" not in str(error):
            raise
        height, width = pixel_values.shape[-2:]
        raise DetectorError(
            f"an input of {height} x {width} pixels has fewer cells in its maps than this detector "
            "has queries: give a larger --input-size or fewer --num-queries, and leave images out "
            "that are much longer than wide"
        ) from error


class PreprocessedDetector(nn.Module):
    """A detector whose input is made by a :class:`Preprocessing`."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self._preprocessing = preprocessing

    def input_geometry(self, original_hw: tuple[int, int], shortest_edge: int = 0) -> ImageGeometry:
        """See :meth:`Detector.input_geometry`."""
        return self._preprocessing.input_geometry(original_hw, shortest_edge)

    def preprocess(self, image: Image.Image, shortest_edge: int = 0) -> Tensor:
        """See :meth:`Detector.preprocess`."""
        return self._preprocessing(image, shortest_edge)

    def _filled(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inputs (B, 3, H, W) with their padding filled, and where it is, (B, H, W), if any."""
        steps = self._preprocessing
        if not steps.pads and steps.pad_multiple == 1:
            return pixel_values, None
        padding = pixel_values[:, 0].isnan()
        fill = pixel_values.new_zeros(3, 1, 1)
        if steps.pad_value is not None:
            fill = steps.normalised(fill.fill_(steps.pad_value))
        return fill.where(padding[:, None], pixel_values), padding


def scale_to_image(padding: Tensor) -> Tensor:
    """What brings boxes that are relative to a padded input to the image, shape (B, 1, 4).

    ``padding`` (B, H, W) is True where a pixel is not of the image.
    """
    inside, (height, width) = ~padding, padding.shape[1:]
    scale = torch.stack((width / inside[:, 0].sum(1), height / inside[:, :, 0].sum(1)), dim=1)
    return scale.repeat(1, 2)[:, None]


def _of_channels(values: float | Sequence[float]) -> tuple[float, float, float]:
    """One value for all channels, or one for each."""
    red, green, blue = values if isinstance(values, Sequence) else (values,) * 3
    return float(red), float(green), float(blue)


def sides_to_fit(sides: Sequence[int], longest: int) -> tuple[int, int]:
    """Shorter and longer side as ``--input-size`` gives them; ``longest`` where it gives one.

    DetectorError if the longer side is the shorter one.
    """
    if sides[-1] < sides[0]:
        raise DetectorError(
            f"--input-size {sides[0]}x{sides[1]}: this detector keeps the shape of an image; give "
            "the shorter side, or SHORTERxLONGER"
        )
    return sides[0], sides[1] if len(sides) > 1 else max(longest, sides[0])


def shortest_edge_size(size_hw: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """The test-time (height, width) of DETR, Deformable DETR, H-DETR and DINO, at least 1 each.

    The shorter side becomes ``shortest`` unless the longer would pass ``longest``; the longer side
    is truncated, as the official code does (so it may pass ``longest`` by one).

    >>> shortest_edge_size((480, 640), 800, 1333)
    (800, 1066)
    >>> shortest_edge_size((200, 640), 800, 1333)
    (417, 1334)
    """
    height, width = size_hw
    small, large = min(size_hw), max(size_hw)
    target = shortest
    if large / small * shortest > longest:
        target = round(longest * small / large)
    if small == target:
        return size_hw
    target = max(target, 1)
    other = max(int(target * large / small), 1)
    return (other, target) if width < height else (target, other)


def size_that_fits(size_hw: tuple[int, int], most_hw: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of an image's shape inside another, as transformers has it.

    >>> size_that_fits((480, 640), (512, 512))
    (384, 512)
    """
    scale = min(most / side for most, side in zip(most_hw, size_hw, strict=True))
    return max(int(size_hw[0] * scale), 1), max(int(size_hw[1] * scale), 1)


def detectron2_size(size_hw: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """The test-time (height, width) of detectron2's ``ResizeShortestEdge``: rounded.

    >>> detectron2_size((480, 640), 800, 1333)
    (800, 1067)
    >>> detectron2_size((200, 640), 800, 1333)
    (417, 1333)
    """
    small = min(size_hw)
    sides = [shortest if side == small else shortest / small * side for side in size_hw]
    scale = min(longest / max(sides), 1.0)
    height, width = (max(int(side * scale + 0.5), 1) for side in sides)
    return height, width


def mmcv_size(size_hw: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """The test-time (height, width) of mmcv's ``Resize``; it differs where a half is rounded.

    >>> mmcv_size((480, 640), 800, 1333)
    (800, 1067)
    """
    scale = min(longest / max(size_hw), shortest / min(size_hw))
    height, width = (max(int(side * scale + 0.5), 1) for side in size_hw)
    return height, width


_SIZES = {"PIL": shortest_edge_size, "detectron2": detectron2_size, "mmcv": mmcv_size}


def opencv_bilinear(image: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """``cv2.resize`` with ``INTER_LINEAR`` of an image (h, w, C), to the bit.

    It does not antialias, and its weights are multiples of 1/2048.
    """
    x0, x1, left, right = _taps(image.shape[1], size_hw[1], inside=True)
    y0, y1, upper, lower = _taps(image.shape[0], size_hw[0], inside=False)
    rows = image.take(x0, 1) * left[:, None] + image.take(x1, 1) * right[:, None]
    rows >>= 4
    above, below = rows.take(y0, 0), rows.take(y1, 0)
    above *= upper[:, None, None]
    below *= lower[:, None, None]
    above >>= 16
    below >>= 16
    above += below
    mixed: NDArray[np.uint8] = ((above + 2) >> 2).astype(np.uint8)
    return mixed


def _taps(source: int, target: int, *, inside: bool) -> tuple[NDArray[Any], ...]:
    """Both cells that an output mixes, and their weights; ``inside`` as OpenCV does along x."""
    place = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = place - first.astype(np.float32)
    if inside:
        share[(first < 0) | (first >= source - 1)] = 0
    weights = (np.rint(w * np.float32(2048)).astype(np.int32) for w in (1 - share, share))
    return (first.clip(0, source - 1), (first + 1).clip(0, source - 1), *weights)
