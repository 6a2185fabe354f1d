"""Box formats, converted. The format stands in every name; nothing here knows about images.

``boxes_xyxy`` are left, top, right, bottom; ``boxes_cxcywh`` are centre and size; ``boxes_xywh`` is
COCO's left, top, width, height. ``_norm`` means divided by the image's width and height.
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Corners of boxes given by centre and size.

    Args:
        boxes_cxcywh: Shape (..., 4), any unit.

    Returns:
        Boxes as left, top, right, bottom in the same unit, shape (..., 4).

    Examples:
        >>> cxcywh_to_xyxy(torch.tensor([5.0, 4.0, 2.0, 6.0])).tolist()
        [4.0, 1.0, 6.0, 7.0]
    """
    cx, cy, w, h = boxes_cxcywh.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Centre and size of boxes given by corners; the inverse of :func:`cxcywh_to_xyxy`.

    Args:
        boxes_xyxy: Shape (..., 4), any unit.

    Returns:
        Boxes as centre x, centre y, width, height, shape (..., 4).
    """
    x0, y0, x1, y1 = boxes_xyxy.unbind(-1)
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)


def scale_boxes(boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Normalised boxes in pixels of an image of the given size.

    Args:
        boxes: Any format with alternating x and y, divided by image width and height; (..., 4).
        size_hw: Height and width of the image in pixels.

    Returns:
        The boxes in pixels, shape (..., 4).
    """
    height, width = size_hw
    return boxes * boxes.new_tensor([width, height, width, height])


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Areas of boxes; a box whose corners are swapped has area zero.

    Args:
        boxes_xyxy: Shape (..., 4).

    Returns:
        Areas in the square of the boxes' unit, shape (...).
    """
    size = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def box_iou(first_xyxy: Tensor, second_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of every pair, and the union areas.

    Args:
        first_xyxy: Shape (N, 4).
        second_xyxy: Shape (M, 4), same unit.

    Returns:
        IoU in [0, 1] and union area, both of shape (N, M). Two empty boxes have IoU 0.
    """
    top_left = torch.maximum(first_xyxy[:, None, :2], second_xyxy[None, :, :2])
    bottom_right = torch.minimum(first_xyxy[:, None, 2:], second_xyxy[None, :, 2:])
    size = (bottom_right - top_left).clamp(min=0)
    intersection = size[..., 0] * size[..., 1]
    union = box_area(first_xyxy)[:, None] + box_area(second_xyxy)[None] - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny), union


def generalized_box_iou(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """Generalised IoU of every pair (Rezatofighi et al., 2019), in [-1, 1].

    Args:
        first_xyxy: Shape (N, 4).
        second_xyxy: Shape (M, 4), same unit.

    Returns:
        Generalised IoU, shape (N, M).
    """
    iou, union = box_iou(first_xyxy, second_xyxy)
    top_left = torch.minimum(first_xyxy[:, None, :2], second_xyxy[None, :, :2])
    bottom_right = torch.maximum(first_xyxy[:, None, 2:], second_xyxy[None, :, 2:])
    size = (bottom_right - top_left).clamp(min=0)
    hull = size[..., 0] * size[..., 1]
    return iou - (hull - union) / hull.clamp(min=torch.finfo(hull.dtype).tiny)
