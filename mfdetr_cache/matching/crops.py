"""Crops of C1 around the queries that training uses."""

import torch

from mfdetr_cache.cache.schema import C1RoiLayout
from mfdetr_cache.head.c1_crops import moments_of
from mfdetr_cache.matching.matchers import hungarian_queries, with_least_side
from mfdetr_cache.ops.boxes import cxcywh_to_xyxy, scale_boxes
from mfdetr_cache.ops.quantisation import StoredMap
from mfdetr_cache.ops.roi_align import RoIAlign
from mfdetr_cache.types import C1Crops, DetectorOutput, GroundTruth, ImageGeometry


def c1_crops(
    output: DetectorOutput, truth: GroundTruth, geometry: ImageGeometry, layout: C1RoiLayout
) -> C1Crops:
    """RoIAlign of C1 for the Hungarian-matched queries of one image; moments of the whole map."""
    c1 = output.maps["c1"]
    boxes = output.boxes_cxcywh_norm[0].cpu()
    queries = hungarian_queries(output.class_logits[0].cpu(), boxes, truth, geometry.original_hw)
    chosen = with_least_side(cxcywh_to_xyxy(boxes)[queries].numpy())
    corners = scale_boxes(torch.from_numpy(chosen), geometry.resized_hw)
    rois = torch.cat((torch.zeros(len(queries), 1), corners), dim=1).to(c1)
    size = layout.roi_size
    # torchvision's on every device: the bytes of a cache must not change with our kernels.
    crops = RoIAlign(size, 4, layout.sampling_ratio).with_torchvision(c1, rois)
    below = crops.reshape(len(queries) * size, size, c1.shape[1])
    return C1Crops(
        query_index=queries,
        crops=StoredMap.plain(below.cpu().numpy()),
        moments=moments_of(c1.double())[0].float().cpu().numpy(),
        c1_hw=(int(c1.shape[-2]), int(c1.shape[-1])),
    )
