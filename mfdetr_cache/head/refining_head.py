"""The mask network whose regions move: ISTR's stages on the fused map, of a frozen detector."""

from dataclasses import replace

import torch

from mfdetr_cache.head.batch import HeadBatch, HeadOutput, RefinedRegions
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.head.refinement import Refinement, moved_boxes
from mfdetr_cache.ops.devices import to_device


class RefiningHead(MaskHead):
    """Cuts regions out anew for every stage; ``predictor`` is a :class:`Refinement`."""

    def forward(self, batch: HeadBatch) -> HeadOutput:
        """Boxes and masks of all regions of a batch, in its order, after the last stage."""
        if not len(batch.queries):
            return self.no_masks(batch.queries)
        refinement = self.predictor
        assert isinstance(refinement, Refinement)
        grouped = batch.by_group()
        fused = [self.fuse(group) for group in grouped.groups]
        order, image, boxes = (
            to_device(torch.from_numpy(values), batch.queries.device)
            for values in (grouped.order, grouped.image, grouped.boxes_xyxy)
        )
        # ISTR's image token is the mean over the map.
        tokens = torch.cat([maps.mean(dim=(2, 3)) for maps in fused])
        queries = self.map_query(batch.queries[order]) + tokens[image]
        stages = []
        for stage in refinement:
            pairs = zip(fused, grouped.rois(), strict=True)
            regions = torch.cat([self.align(maps, rois) for maps, rois in pairs])
            queries, deltas, codes = stage(queries, regions, image)
            # In 16 bits a box would lose the pixels that a stage moves it by.
            precise = torch.promote_types(deltas.dtype, torch.float32)
            boxes = moved_boxes(boxes.detach(), deltas.to(precise))
            grouped = replace(grouped, boxes_xyxy=boxes.detach().cpu().numpy())
            stages.append(RefinedRegions(grouped.to_batch(boxes), grouped.to_batch(codes)))
        codes = stages[-1].codes
        return HeadOutput(refinement.codec.decode(codes), None, codes, stages=tuple(stages))
