"""Box feature encoder F_b: refines the features inside each box (Eq. 9, Table 3)."""

import torch
from torch import Tensor, nn

from mfdetr_cache.head.blocks.deformable import DeformableLayer, cell_centres


class DeformableBoxEncoder(nn.Module):
    """Deformable layers over the r x r cells of one box, with a learned position table."""

    def __init__(self, width: int, roi_size: int, num_layers: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(roi_size * roi_size, width))
        nn.init.normal_(self.position, std=0.02)
        self.layers = nn.ModuleList(DeformableLayer(width, 1) for _ in range(num_layers))

    def forward(self, regions: Tensor) -> Tensor:
        """Refine region features of shape (R, r, r, d)."""
        # A region is one level of r x r tokens; every token is a query.
        side = int(regions.shape[1])
        sizes_hw = ((side, side),)
        centres = cell_centres(sizes_hw, regions.device).to(regions.dtype)
        tokens = regions.flatten(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, self.position, centres, tokens, sizes_hw)
        refined: Tensor = tokens.unflatten(1, (side, side))
        return refined
