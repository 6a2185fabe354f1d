"""From queries and region features to mask logits (Eq. 4, Table 12).

Every predictor returns logits and mask codes; only that of ``mask_embedding.py`` has codes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class DotProductPredictor(nn.Module):
    """The logit of a cell is the dot product of its feature with the query (Eq. 4)."""

    def forward(self, queries: Tensor, regions: Tensor) -> tuple[Tensor, None]:
        """Logits (R, r, r) of queries (R, d) and regions (R, r, r, d); there are no codes."""
        return torch.einsum("rd,rhwd->rhw", queries, regions), None


class SegmenterPredictor(nn.Module):
    """Both sides projected and normalised before the dot product (Table 12, after Segmenter).

    ``temperature`` scales the cosine, so that logits leave [-1, 1].
    """

    def __init__(self, width: int, temperature: float = 20.0) -> None:
        super().__init__()
        self.project_query = nn.Linear(width, width, bias=False)
        self.project_region = nn.Linear(width, width, bias=False)
        self.temperature = temperature
        for linear in (self.project_query, self.project_region):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, queries: Tensor, regions: Tensor) -> tuple[Tensor, None]:
        """Logits (R, r, r) of queries (R, d) and regions (R, r, r, d); there are no codes."""
        query = functional.normalize(self.project_query(queries), dim=-1)
        region = functional.normalize(self.project_region(regions), dim=-1)
        return self.temperature * torch.einsum("rd,rhwd->rhw", query, region), None


class FcnPredictor(nn.Module):
    """Mask R-CNN's head on the same region features, class-agnostic and without the query.

    ``depth`` 3x3 convolutions and a 1x1 (He et al., 2017, Fig. 4), without the deconvolution:
    regions already have the resolution of the mask.
    """

    def __init__(self, width: int, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.last = nn.Conv2d(width, 1, 1)
        for conv in (*self.layers, self.last):
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, _queries: Tensor, regions: Tensor) -> tuple[Tensor, None]:
        """Logits (R, r, r) of regions (R, r, r, d) alone; there are no codes."""
        maps = regions.permute(0, 3, 1, 2)
        for layer in self.layers:
            maps = functional.relu(layer(maps))
        return self.last(maps)[:, 0], None


class DynamicConvPredictor(nn.Module):
    """QueryInst's mask head (Fang et al., 2021, arXiv 2105.01928, section 3.2): DynConv, then FCN.

    The query makes the weights of two 1x1 convolutions over its region, each followed by layer
    norm and ReLU; Mask R-CNN's convolutions read the result. The narrow middle has a quarter of
    the width, as 64 of 256 there.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.middle = max(8, width // 4)
        self.weights = nn.Linear(width, 2 * width * self.middle)
        self.norms = nn.ModuleList((nn.LayerNorm(self.middle), nn.LayerNorm(width)))
        self.fcn = FcnPredictor(width)
        nn.init.xavier_uniform_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)

    def forward(self, queries: Tensor, regions: Tensor) -> tuple[Tensor, None]:
        """Logits (R, r, r) of queries (R, d) and regions (R, r, r, d); there are no codes."""
        into, out = self.weights(queries).chunk(2, dim=-1)
        cells = regions.flatten(1, 2)
        cells = functional.relu(self.norms[0](cells @ into.unflatten(-1, (-1, self.middle))))
        cells = functional.relu(self.norms[1](cells @ out.unflatten(-1, (self.middle, -1))))
        mixed: tuple[Tensor, None] = self.fcn(queries, cells.view_as(regions))
        return mixed
