"""The mask network without RoIAlign: masks over the whole image, in two rows of Table 1."""

import torch
from torch import Tensor

from mfdetr_cache.errors import HeadError
from mfdetr_cache.head.batch import HeadBatch, HeadOutput, QueryContext
from mfdetr_cache.head.mask_head import MaskHead


class WholeImageHead(MaskHead):
    """Compares queries with every cell of the fused map; parameters are named as in MaskHead."""

    def forward(self, batch: HeadBatch) -> HeadOutput:
        """Masks of all queries of a batch of one image; HeadError for more."""
        if not len(batch.queries):
            return self.no_masks(batch.queries)
        if len(batch.groups) != 1 or len(batch.groups[0].members) != 1:
            raise HeadError("a head without RoIAlign takes one image at a time")
        return self.decode_image(self.fuse(batch.groups[0]), batch.queries, batch.context)

    def decode_image(
        self, fused: Tensor, queries: Tensor, context: QueryContext | None = None
    ) -> HeadOutput:
        """Mask logits (R, h, w): the dot product of each query with every cell of one image.

        Of the fused map (1, d, h, w) and queries (R, query_dim); ``context`` are the detected
        queries of the image, None where these are all.
        """
        image = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
        queries = self.map_query(self.query_encoder(queries, queries[:, None], image, context))
        return HeadOutput(torch.einsum("rd,dhw->rhw", queries, fused[0]), None)
