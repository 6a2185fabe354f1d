"""Conversions of box formats. The format is part of every name.

``boxes_xyxy`` are left, top, right, bottom; ``boxes_cxcywh`` are centre and size; ``boxes_xywh`` is
COCO's left, top, width, height. ``_norm`` means divided by the image's width and height.
"""

from torch import Tensor
from torchvision import ops


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Corners, shape (..., 4) in the same unit."""
    corners: Tensor = ops.box_convert(boxes_cxcywh, "cxcywh", "xyxy")
    return corners


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Centre and size, shape (..., 4) in the same unit."""
    centres: Tensor = ops.box_convert(boxes_xyxy, "xyxy", "cxcywh")
    return centres


def scale_boxes(boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Normalised boxes (..., 4), in any format with alternating x and y, in pixels of the image."""
    height, width = size_hw
    return boxes * boxes.new_tensor([width, height, width, height])


def box_iou(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """Intersection over union of every pair, shape (N, M); two empty boxes have 0, not NaN."""
    iou: Tensor = ops.box_iou(first_xyxy, second_xyxy)
    return iou.nan_to_num(0)
