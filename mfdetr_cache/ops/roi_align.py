"""RoIAlign (Eq. 3), channels last: compiled kernels on a CPU, torchvision's elsewhere."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision import ops

from mfdetr_cache.ops.devices import is_plain


class RoIAlign(nn.Module):
    """Means of bilinear samples in the cells of each region (He et al., 2017; ``aligned``).

    Args:
        size: Cells r of a region along an axis.
        stride: Network input pixels per cell of the map.
        sampling_ratio: Samples per cell along an axis; 0 takes its extent in map cells, rounded up.
    """

    def __init__(self, size: int, stride: int, sampling_ratio: int) -> None:
        super().__init__()
        self.size = size
        self.stride = stride
        self.sampling_ratio = sampling_ratio

    def forward(self, maps: Tensor, rois: Tensor) -> Tensor:
        """RoIAlign of maps (B, C, h, w), shape (R, r, r, C), dtype of the maps.

        ``rois`` are the image's index, then x0, y0, x1, y1 in network input pixels, shape (R, 5).
        """
        # Coordinates do not survive 8 bits of mantissa.
        precise = torch.promote_types(maps.dtype, torch.float32)
        cells, rois = maps.to(precise), rois.to(precise)
        if not is_plain(cells) or cells.device.type != "cpu":
            return self.with_torchvision(cells.contiguous(), rois).to(maps.dtype)
        # numba takes half a second to import; a GPU never needs it.
        from mfdetr_cache.ops.roi_align_numba import KernelRoIAlign

        aligned: Tensor = KernelRoIAlign.apply(
            cells, rois, self.size, 1 / self.stride, self.sampling_ratio
        )
        return aligned.to(maps.dtype)

    def with_torchvision(self, maps: Tensor, rois: Tensor) -> Tensor:
        """:meth:`forward` by torchvision's operator, on any device.

        Its values differ from the kernels' in the last bits: it computes coordinates in the
        precision of the maps, the kernels in float64.
        """
        aligned: Tensor = ops.roi_align(
            maps,
            rois,
            (self.size, self.size),
            1 / self.stride,
            self.sampling_ratio or -1,
            aligned=True,
        )
        return aligned.permute(0, 2, 3, 1)

    def coverage(
        self, boxes_xyxy: NDArray[np.floating], maps_hw: NDArray[np.int64]
    ) -> NDArray[np.floating]:
        """Fraction of the samples inside the map, per row and per column of cells, shape (2, R, r).

        Their product is the RoIAlign of a map of ones: a sample counts where it is inside along
        both axes, and the bilinear weights of one add up to 1. ``boxes_xyxy`` (R, 4) are in network
        input pixels, ``maps_hw`` (R, 2) in cells.
        """
        size, ratio, scale = self.size, self.sampling_ratio, 1 / self.stride
        corners = boxes_xyxy.reshape(-1, 2, 2)[:, :, ::-1].transpose(1, 2, 0) * scale  # y before x
        start, length = corners[0] - 0.5, corners[1] - corners[0]  # (2, R)
        spanned = np.ceil(length / size).clip(0)
        number = np.full_like(spanned, ratio) if ratio else spanned
        # Samples beyond a region's own number are computed and not counted.
        most = max(int(number.max(initial=0)), 1)
        cell, sample = np.arange(size)[:, None], np.arange(most)
        step = (length / size)[..., None, None]
        count = np.maximum(number, 1)[..., None, None]
        at = start[..., None, None] + cell * step + (sample + 0.5) * step / count
        is_inside = (at >= -1) & (at <= maps_hw.T[..., None, None])
        counted = sample < number[..., None, None]
        share: NDArray[np.floating] = ((is_inside & counted).sum(-1) / count[..., 0]).astype(
            boxes_xyxy.dtype
        )
        return share
