"""A finer grid for the mask: the coarse mask corrected where the region's features have detail.

The box encoder sees the whole object on a coarse grid; an edge needs more cells and less context.
As in PointRend (Kirillov et al., 2020) coarse and fine features meet in each fine cell, but in all
of them: on grids of this size convolutions are cheaper than choosing points.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.head.fusion import resize_map


class FineMask(nn.Module):
    """Corrects up-sampled coarse logits by the dot product of query and fine features.

    Args:
        width: Channels d of regions and mapped queries.
        fine_width: Channels w of the fine features.
        num_layers: Depth-wise 3x3 convolutions, each with a mixing of channels and a residual.
    """

    def __init__(self, width: int, fine_width: int, num_layers: int) -> None:
        super().__init__()
        self.detail = nn.Linear(width, fine_width)
        # Beside the region's features the logit, which says what the coarse grid takes for mask.
        self.context = nn.Linear(width + 1, fine_width)
        self.layers = nn.ModuleList(FineLayer(fine_width) for _ in range(num_layers))
        self.query = nn.Linear(width, fine_width)
        for linear in (self.detail, self.context):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        # No correction at first: the mask begins as the coarse one.
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.query.bias)

    def forward(self, logits: Tensor, queries: Tensor, regions: Tensor, fine: Tensor) -> Tensor:
        """Logits on the fine grid, (R, s, s), from those of the coarse mask, (R, r, r).

        With mapped queries (R, d), region features after the box encoder (R, r, r, d), and ``fine``
        ones on the fine grid (R, s, s, d).
        """
        context = self.context(torch.cat((regions, logits[..., None]), dim=-1))
        cells = functional.relu(self.detail(fine) + _resized(context, fine.shape[1]))
        for layer in self.layers:
            cells = layer(cells)
        correction = torch.einsum("rw,rhvw->rhv", self.query(queries), cells)
        refined: Tensor = _resized(logits[..., None], fine.shape[1])[..., 0] + correction
        return refined


def _resized(cells: Tensor, size: int) -> Tensor:
    """Bilinear resizing of cells (R, r, r, w) to (R, size, size, w)."""
    return resize_map(cells.permute(0, 3, 1, 2), (size, size)).permute(0, 2, 3, 1)


class FineLayer(nn.Module):
    """A depth-wise 3x3 convolution, a linear layer and ReLU, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.linear = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cells: Tensor) -> Tensor:
        """Refine cells of shape (R, s, s, w)."""
        mixed = self.depthwise(cells.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        refined: Tensor = cells + functional.relu(self.linear(mixed))
        return refined
