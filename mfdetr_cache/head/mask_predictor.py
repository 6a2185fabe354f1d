"""From queries and region features to mask logits (Eq. 4, Table 12)."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class DotProductPredictor(nn.Module):
    """The logit of a cell is the dot product of its feature with the query (Eq. 4)."""

    def forward(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Mask logits.

        Args:
            queries: Shape (R, d).
            regions: Shape (R, r, r, d).

        Returns:
            Shape (R, r, r).
        """
        return torch.einsum("rd,rhwd->rhw", queries, regions)


class SegmenterPredictor(nn.Module):
    """Both sides projected and normalised before the dot product (Table 12, after Segmenter).

    Args:
        width: Channels d.
        temperature: Scale of the cosine, so that logits leave [-1, 1].
    """

    def __init__(self, width: int, temperature: float = 20.0) -> None:
        super().__init__()
        self.project_query = nn.Linear(width, width, bias=False)
        self.project_region = nn.Linear(width, width, bias=False)
        self.temperature = temperature
        for linear in (self.project_query, self.project_region):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Mask logits.

        Args:
            queries: Shape (R, d).
            regions: Shape (R, r, r, d).

        Returns:
            Shape (R, r, r).
        """
        query = functional.normalize(self.project_query(queries), dim=-1)
        region = functional.normalize(self.project_region(regions), dim=-1)
        return self.temperature * torch.einsum("rd,rhwd->rhw", query, region)
