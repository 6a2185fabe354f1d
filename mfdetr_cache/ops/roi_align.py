"""RoIAlign, channels last: torchvision's, and compiled kernels on a CPU."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import ops

from mfdetr_cache.ops.devices import is_plain


def roi_align(maps: Tensor, rois: Tensor, size: int, scale: float, ratio: int) -> Tensor:
    """Means of bilinear samples in the cells of each region (He et al., 2017; ``aligned``).

    Args:
        maps: Shape (B, C, h, w).
        rois: Index of the image, then x0, y0, x1, y1 in network input pixels, shape (R, 5).
        size: Cells r of a region along an axis.
        scale: Cells of the map per input pixel.
        ratio: Samples per cell along an axis; 0 takes as many as it spans, rounded up.

    Returns:
        Shape (R, r, r, C), dtype of the maps.
    """
    # Coordinates do not survive 8 bits of mantissa.
    precise = torch.promote_types(maps.dtype, torch.float32)
    cells, places = maps.to(precise), rois.to(precise)
    if is_plain(cells) and cells.device.type == "cpu":
        # numba takes half a second to import; a GPU never needs it.
        from mfdetr_cache.ops.roi_align_numba import KernelRoiAlign

        found: Tensor = KernelRoiAlign.apply(cells, places, size, scale, ratio)
    else:
        found = ops.roi_align(
            cells.contiguous(), places, (size, size), scale, ratio or -1, aligned=True
        ).permute(0, 2, 3, 1)
    return found.to(maps.dtype)


def roi_coverage(
    boxes_xyxy: NDArray[np.floating],
    maps_hw: NDArray[np.int64],
    size: int,
    scale: float,
    ratio: int,
) -> NDArray[np.floating]:
    """Share of the samples of each row and column of cells that lie inside the map.

    Their product is :func:`roi_align` of a map of ones: a sample counts where it is inside along
    both axes, and the bilinear weights of one add up to 1.

    Args:
        boxes_xyxy: In network input pixels, shape (R, 4).
        maps_hw: Height and width of each box's map in cells, shape (R, 2).
        size: Cells r of a region along an axis.
        scale: Cells of the map per input pixel.
        ratio: Samples per cell along an axis; 0 takes as many as it spans, rounded up.

    Returns:
        Shares of the rows, then of the columns, shape (2, R, r).
    """
    corners = boxes_xyxy.reshape(-1, 2, 2)[:, :, ::-1].transpose(1, 2, 0) * scale  # y before x
    start, length = corners[0] - 0.5, corners[1] - corners[0]  # (2, R)
    spanned = np.ceil(length / size).clip(0)
    number = np.full_like(spanned, ratio) if ratio else spanned
    most = max(int(number.max(initial=0)), 1)
    cell, sample = np.arange(size)[:, None], np.arange(most)
    step = (length / size)[..., None, None]
    count = np.maximum(number, 1)[..., None, None]
    at = start[..., None, None] + cell * step + (sample + 0.5) * step / count
    inside = (at >= -1) & (at <= maps_hw.T[..., None, None]) & (sample < number[..., None, None])
    share: NDArray[np.floating] = (inside.sum(-1) / count[..., 0]).astype(boxes_xyxy.dtype)
    return share
