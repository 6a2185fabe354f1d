"""PointRend (Kirillov et al., 2020, arXiv 1912.08193): a mask refined where it is least certain."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.head.fusion import resize_map
from mfdetr_cache.ops.points import bilinear_at


class PointMask(nn.Module):
    """Predicts single points of a mask from fine features and the coarse mask there.

    An MLP that is given the coarse logit in every layer (section 3.3). It is trained on points of
    the loss's choice, through :meth:`at`; :meth:`forward` subdivides (section 3.1). As one mask for
    all labels, with logits as coarse prediction.

    Args:
        width: Channels d of the fine features.
        hidden: Channels of the hidden layers; the paper's are as wide as its features, 256.
        num_layers: Hidden layers; the paper has 3.
        num_points: Points per subdivision; the paper has 28 x 28.
    """

    def __init__(self, width: int, hidden: int, num_layers: int, num_points: int) -> None:
        super().__init__()
        widths = [width, *[hidden] * num_layers]
        self.layers = nn.ModuleList(nn.Linear(w + 1, hidden) for w in widths[:-1])
        self.last = nn.Linear(widths[-1] + 1, 1)
        self.num_points = num_points
        for linear in (*self.layers, self.last):
            assert isinstance(linear, nn.Linear)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.last.weight, std=1e-3)

    def at(self, points: Tensor, logits: Tensor, fine: Tensor) -> Tensor:
        """Logits (R, N) of points (R, N, 2), x and y in [0, 1] over each box.

        With those of the coarse mask, (R, r, r), and ``fine`` region features (R, s, s, d).
        """
        # Losses are computed outside of mixed precision, and ask from there.
        logits, fine = logits.to(self.last.weight), fine.to(self.last.weight)
        coarse = bilinear_at(logits[:, None], points).transpose(1, 2)
        cells = bilinear_at(fine.permute(0, 3, 1, 2), points).transpose(1, 2)
        for layer in self.layers:
            cells = functional.relu(layer(torch.cat((cells, coarse), dim=-1)))
        found: Tensor = self.last(torch.cat((cells, coarse), dim=-1))[..., 0]
        return found

    def forward(self, logits: Tensor, fine: Tensor) -> Tensor:
        """Logits (R, s, s), in the terms of :meth:`at`.

        The mask is up-sampled to twice its side until it has the fine grid's, and each time the
        least certain points are replaced by what the MLP says there.
        """
        coarse = logits
        for side, count in self.subdivisions(int(logits.shape[1]), int(fine.shape[1])):
            cells = resize_map(logits[:, None], (side, side)).flatten(1)
            index = cells.detach().abs().topk(count, dim=1, largest=False).indices
            points = (torch.stack((index % side, index // side), dim=-1) + 0.5) / side
            refined = self.at(points.to(fine.dtype), coarse, fine)
            logits = cells.scatter(1, index, refined.to(cells.dtype)).unflatten(1, (side, side))
        return logits

    def subdivisions(self, coarse: int, fine: int) -> Iterator[tuple[int, int]]:
        """Side and number of points of each subdivision, from one side to the other."""
        while coarse < fine:
            coarse = min(2 * coarse, fine)
            yield coarse, min(self.num_points, coarse**2)
