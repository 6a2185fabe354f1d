"""The mask network of Mask Frozen-DETR (Fig. 2): frozen maps, boxes and queries in, masks out."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.head.batch import HeadBatch, HeadOutput, MapGroup, QueryContext, RegionsByGroup
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.fine_mask import FineMask
from mfdetr_cache.head.fusion import FeatureFusion, LevelProjections
from mfdetr_cache.head.mask_embedding import EmbeddingPredictor, MaskCodec
from mfdetr_cache.head.mask_scoring import MaskScoring
from mfdetr_cache.head.point_mask import PointMask
from mfdetr_cache.head.refinement import Refinement
from mfdetr_cache.ops.roi_align import RoIAlign
from mfdetr_cache.types import MapSpec


class MaskHead(nn.Module):
    """Masks for the boxes of a frozen detector, from its queries and its maps.

    :func:`mfdetr_cache.head.build.build_head` chooses the parts. Maps come from a cache or from a
    live detector; this module cannot tell. D is the width of the encoder, d that of the regions, r
    their cells along an axis, s those of the finer grid where there is one, else r.

    Args:
        config: What the parts were built from.
        levels: The maps that the image encoder refines, finest first.
        c1: The backbone's stride-4 map; None where it is not fused.
        projections: From maps by name to all levels at width D.
        image_encoder: F_e, from the levels to the one that is fused, refined (Eq. 6-8).
        fusion: Adds C1 to the refined level (Eq. 1, 5, 14).
        map_features: Channel mapper from D to d.
        align: RoIAlign (Eq. 3).
        map_query: Channel mapper from the queries' width to d.
        box_encoder: F_b, over the region features (Eq. 9).
        query_encoder: F_q (Eq. 10, 11).
        predictor: From queries and regions to mask logits (Eq. 4).
        scoring: Predicts the IoU of each mask (Eq. 12); None where it is left out.
        fine: Corrects the mask on a finer grid; None where it is left out.
    """

    def __init__(  # noqa: PLR0913  as many as the network has parts
        self,
        config: HeadConfig,
        levels: tuple[MapSpec, ...],
        c1: MapSpec | None,
        *,
        projections: LevelProjections,
        image_encoder: nn.Module,
        fusion: FeatureFusion,
        map_features: nn.Module,
        align: RoIAlign,
        map_query: nn.Module,
        box_encoder: nn.Module,
        query_encoder: nn.Module,
        predictor: nn.Module,
        scoring: MaskScoring | None,
        fine: FineMask | PointMask | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.levels = levels
        self.c1 = c1
        self.projections = projections
        self.image_encoder = image_encoder
        self.fusion = fusion
        self.map_features = map_features
        self.align = align
        self.map_query = map_query
        self.box_encoder = box_encoder
        self.query_encoder = query_encoder
        self.predictor = predictor
        self.scoring = scoring
        self.fine = fine

    @property
    def map_names(self) -> tuple[str, ...]:
        """The maps this head reads; others in a cache need not be read from disk."""
        return tuple(m.name for m in (*self.levels, self.c1) if m is not None)

    @property
    def codec(self) -> MaskCodec | None:
        """The basis of a mask embedding, to be fitted before training; None without one."""
        predictor = self.predictor
        return predictor.codec if isinstance(predictor, EmbeddingPredictor | Refinement) else None

    def forward(self, batch: HeadBatch) -> HeadOutput:
        """Mask logits and predicted IoUs of all regions, in the order of the batch."""
        if not len(batch.queries):
            return self.no_masks(batch.queries)
        # Maps of different sizes cannot be stacked: up to RoIAlign, one group after the other.
        grouped = batch.by_group()
        regions = grouped.to_batch(self.region_features(grouped))
        return self.decode(regions, batch.queries, batch.image_index, batch.context)

    def prepare(self, batch: HeadBatch) -> HeadBatch:
        """Do beforehand what no weight takes part in; here there is nothing."""
        return batch

    def fuse(self, group: MapGroup) -> Tensor:
        """The fused map F of equal-sized images: (B, d, H/s, W/s) at the stride s of ``align``."""
        refined = self.image_encoder(self.projections(group.maps))  # Eq. 6-8
        c1 = group.maps[self.c1.name] if self.c1 is not None else None
        fused: Tensor = self.map_features(self.fusion(c1, refined, group.input_hw))  # Eq. 1, 5, 14
        return fused

    def region_features(self, grouped: RegionsByGroup) -> Tensor:
        """Features R_i inside each box, in the order of the groups: (R, s, s, d)."""
        fused = (self.fuse(group) for group in grouped.groups)  # Eq. 1, 5-8, 14
        pairs = zip(fused, grouped.rois(), strict=True)
        return torch.cat([self.align(maps, rois) for maps, rois in pairs])  # Eq. 3

    def decode(
        self,
        regions: Tensor,
        queries: Tensor,
        image_index: Tensor,
        context: QueryContext | None = None,
    ) -> HeadOutput:
        """Masks of region features (R, s, s, d), in the terms of :class:`HeadBatch`."""
        cut = regions
        if self.fine is not None:
            regions = _means(cut, self.config.roi_size)
        regions = self.box_encoder(regions)  # Eq. 9
        cells = regions.flatten(1, 2)
        queries = self.query_encoder(queries, cells, image_index, context)  # Eq. 10, 11
        queries = self.map_query(queries)
        logits, codes = self.predictor(queries, regions)  # Eq. 4
        scoring = self.scoring
        iou = scoring(logits.sigmoid(), regions) if scoring is not None else None  # Eq. 12
        if self.fine is None:
            return HeadOutput(logits, iou, codes)
        if isinstance(self.fine, PointMask):
            if self.training:
                # The loss chooses the points.
                refine = functools.partial(self.fine.at, logits=logits, fine=cut)
                return HeadOutput(logits, iou, codes, refine=refine)
            return HeadOutput(self.fine(logits, cut), iou, codes, logits)
        return HeadOutput(self.fine(logits, queries, regions, cut), iou, codes, logits)

    def no_masks(self, queries: Tensor) -> HeadOutput:
        """The output for no region: the layers below take at least one."""
        size = self.config.grid_size
        iou = queries.new_zeros(0, self.scoring.num_labels) if self.scoring is not None else None
        return HeadOutput(queries.new_zeros(0, size, size), iou)


def _means(cells: Tensor, size: int) -> Tensor:
    """Means of equal squares of cells, shape (R, s, s, d) to (R, size, size, d)."""
    pooled = functional.avg_pool2d(cells.permute(0, 3, 1, 2), cells.shape[1] // size)
    return pooled.permute(0, 2, 3, 1)
