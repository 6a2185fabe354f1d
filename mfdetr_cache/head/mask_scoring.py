"""Mask scoring: predicts the IoU of each mask (Eq. 12, Table 6)."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

_WIDTH = 128


class MaskScoring(nn.Module):
    """Three strided convolutions over mask and features, then an MLP with one output per label."""

    def __init__(self, region_width: int, roi_size: int, num_labels: int) -> None:
        super().__init__()
        self.num_labels = num_labels
        widths = [region_width + 1, _WIDTH, _WIDTH, _WIDTH]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths)
        )
        cells = (roi_size // 8) ** 2
        self.linears = nn.ModuleList((nn.Linear(_WIDTH * cells, _WIDTH), nn.Linear(_WIDTH, _WIDTH)))
        self.output = nn.Linear(_WIDTH, num_labels)
        for module in (*self.convs, *self.linears):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        # Training begins with a predicted IoU of about a half.
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.constant_(self.output.bias, 0.5)

    def forward(self, mask_probs: Tensor, regions: Tensor) -> Tensor:
        """Predicted IoU for every label, unbounded, shape (R, K).

        Args:
            mask_probs: After the sigmoid, shape (R, r, r). Gradients do not reach it: the score
                must not make masks easier to score.
            regions: Shape (R, r, r, d).
        """
        maps = torch.cat((mask_probs.detach()[..., None], regions), dim=-1).permute(0, 3, 1, 2)
        for conv in self.convs:
            maps = functional.relu(conv(maps))
        hidden = maps.flatten(1)
        for linear in self.linears:
            hidden = functional.relu(linear(hidden))
        scores: Tensor = self.output(hidden)
        return scores
