"""ISTR's stages (Hu et al., 2021, arXiv 2105.00637): box, query and mask code refined in turn.

On a frozen detector they begin with its boxes and queries, and its classes stay.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mfdetr_cache.head.batch import QueryContext
from mfdetr_cache.head.mask_embedding import MaskCodec, RegionToQuery
from mfdetr_cache.head.query_encoder import ObjectToObject

# Deltas are divided by these, and sizes grow by no more than this factor, as in Faster R-CNN.
_DELTA_SCALE = (2.0, 2.0, 1.0, 1.0)
_LARGEST_LOG_SCALE = math.log(100_000 / 16)
# Layers before each prediction, and how much wider the FFN is, as in ISTR.
_TOWER_DEPTH = 3
_FFN_FACTOR = 8


class RefinementStage(nn.Module):
    """Queries attend to one another and to their region, then predict a box delta and a code.

    Without dropout and classes; otherwise ISTR's.
    """

    def __init__(self, width: int, code_width: int) -> None:
        super().__init__()
        self.attention = ObjectToObject(width)
        self.region = RegionToQuery(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, _FFN_FACTOR * width), nn.ELU(), nn.Linear(_FFN_FACTOR * width, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.delta = _tower(width, 4)
        self.code = _tower(width, code_width)
        # The first boxes are the detector's.
        last = self.delta[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(
        self, queries: Tensor, regions: Tensor, image_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New queries (R, d), box deltas (R, 4) and mask codes (R, K).

        From queries (R, d), their region features (R, r, r, d) and the image of each, (R,).
        """
        others = QueryContext(queries, image_index)
        queries = self.norms[0](queries + self.attention(queries, image_index, others))
        queries = self.norms[1](queries + self.region.joined(queries, regions))
        queries = self.norms[2](queries + self.ffn(queries))
        return queries, self.delta(queries), self.code(queries)


class Refinement(nn.Module):
    """T stages with weights of their own, and the codec of their mask codes."""

    def __init__(self, width: int, code_width: int, num_stages: int, codec: MaskCodec) -> None:
        super().__init__()
        self.codec = codec
        self.stages = nn.ModuleList(RefinementStage(width, code_width) for _ in range(num_stages))

    def __iter__(self) -> Iterator[RefinementStage]:
        return iter(self.stages)  # type: ignore[arg-type]


def _tower(width: int, out: int) -> nn.Sequential:
    layers = [
        layer
        for _ in range(_TOWER_DEPTH)
        for layer in (nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ELU())
    ]
    return nn.Sequential(*layers, nn.Linear(width, out))


def moved_boxes(boxes_xyxy: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (R, 4) moved by deltas of centre and logarithmic size, as in Faster R-CNN."""
    scale = deltas.new_tensor(_DELTA_SCALE)
    low, high = boxes_xyxy.to(deltas.dtype).split(2, dim=-1)
    shift, growth = (deltas / scale).split(2, dim=-1)
    size = high - low
    centre = (low + high) / 2 + shift * size
    half = size * growth.clamp(max=_LARGEST_LOG_SCALE).exp() / 2
    return torch.cat((centre - half, centre + half), dim=-1)
