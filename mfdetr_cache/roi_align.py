"""RoIAlign, channels last: torchvision's, and compiled kernels on a CPU."""

import torch
from torch import Tensor
from torchvision import ops

from mfdetr_cache.devices import is_plain


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
        from mfdetr_cache.roi_kernels import KernelRoiAlign

        found: Tensor = KernelRoiAlign.apply(cells, places, size, scale, ratio)
    else:
        found = ops.roi_align(
            cells.contiguous(), places, (size, size), scale, ratio or -1, aligned=True
        ).permute(0, 2, 3, 1)
    return found.to(maps.dtype)
