"""Query encoder: object-to-object and box-to-object attention, FFN (Eq. 10-11, Table 5)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.head.batch import QueryContext
from mfdetr_cache.head.blocks.deformable import num_heads_for


def _xavier(linear: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class ObjectToObject(nn.Module):
    """Attention among the queries of one image, without output projection (Eq. 10)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = num_heads_for(width)
        self.query = _xavier(nn.Linear(width, width))
        self.key = _xavier(nn.Linear(width, width))
        self.value = _xavier(nn.Linear(width, width))

    def forward(self, queries: Tensor, image_index: Tensor, context: QueryContext) -> Tensor:
        """Residual (R, D) of queries (R, D) that attend to the detected ones of their image."""
        query, key, value = (
            f(x).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
            for f, x in (
                (self.query, queries),
                (self.key, context.queries),
                (self.value, context.queries),
            )
        )
        same = image_index[:, None] == context.image_index[None, :]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=same)
        return mixed.transpose(0, 1).flatten(1)


class BoxToObject(nn.Module):
    """Each query attends to the cells of its own box, without output projection (Eq. 11).

    Keys and values are linear in the region features, so their projections are applied to the query
    and to the attended sum instead of to all r x r cells: q.(W_k R + b_k) = (W_k^T q).R + const,
    and the constant does not change the softmax. That is the same function with a thirtieth of the
    multiplications at r = 32, d = 128. Setting ``folded`` to False projects all cells, as the
    paper's MAC column counts.
    """

    def __init__(self, query_width: int, region_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads_for(query_width)
        self.folded = True
        self.query = _xavier(nn.Linear(query_width, query_width))
        self.key = _xavier(nn.Linear(region_width, query_width))
        self.value = _xavier(nn.Linear(region_width, query_width))

    def forward(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Residual (R, D) of queries (R, D) that attend to region features (R, cells, d)."""
        heads = self.num_heads
        query = self.query(queries).unflatten(-1, (heads, -1))  # (R, H, D/H)
        if not self.folded:
            key = self.key(regions).unflatten(-1, (heads, -1)).transpose(1, 2)  # (R, H, cells, .)
            value = self.value(regions).unflatten(-1, (heads, -1)).transpose(1, 2)
            plain = functional.scaled_dot_product_attention(query[:, :, None], key, value)
            return plain[:, :, 0].flatten(1)
        # Logits of the cells from W_k^T q in place of the keys.
        scale = query.shape[-1] ** -0.5
        key_weight = self.key.weight.unflatten(0, (heads, -1))  # (H, D/H, d)
        key_bias = self.key.bias.unflatten(0, (heads, -1))
        folded = torch.einsum("rhe,hed->rhd", query, key_weight)
        scores = torch.einsum("rhd,rcd->rhc", folded, regions)
        # The bias shifts all cells of a head alike; it stays so that autograd sees the parameter.
        scores = scores + torch.einsum("rhe,he->rh", query, key_bias)[..., None]
        weights = (scores * scale).softmax(-1)
        # W_v after the weighted sum of cells in place of the values.
        attended = torch.einsum("rhc,rcd->rhd", weights, regions)
        value_weight = self.value.weight.unflatten(0, (heads, -1))
        mixed = torch.einsum("rhd,hed->rhe", attended, value_weight).flatten(1)
        return mixed + self.value.bias


class QueryEncoder(nn.Module):
    """F_q: object-to-object attention, box-to-object attention, FFN, each optional and residual."""

    def __init__(
        self, query_width: int, region_width: int, *, ffn: bool, o2o: bool, b2o: bool
    ) -> None:
        super().__init__()
        self.o2o = ObjectToObject(query_width) if o2o else None
        self.b2o = BoxToObject(query_width, region_width) if b2o else None
        self.ffn = (
            nn.Sequential(
                _xavier(nn.Linear(query_width, 2 * query_width)),
                nn.GELU(),
                _xavier(nn.Linear(2 * query_width, query_width)),
            )
            if ffn
            else None
        )

    def forward(
        self,
        queries: Tensor,
        regions: Tensor,
        image_index: Tensor,
        context: QueryContext | None = None,
    ) -> Tensor:
        """Refine queries (R, D) with region features (R, cells, d) and the image of each, (R,).

        ``context`` are the detected queries of the images; None if these are ``queries``.
        """
        if self.o2o is not None:
            seen = context or QueryContext(queries, image_index)
            queries = queries + self.o2o(queries, image_index, seen)
        if self.b2o is not None:
            queries = queries + self.b2o(queries, regions)
        if self.ffn is not None:
            queries = queries + self.ffn(queries)
        return queries
