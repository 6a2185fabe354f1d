import itertools

import numpy as np
import torch

from mfdetr_cache.boxes import cxcywh_to_xyxy, generalized_box_iou
from mfdetr_cache.training.matching import match_by_iou, match_hungarian


def scene(num_queries: int = 5, num_objects: int = 3) -> tuple[torch.Tensor, ...]:
    logits = torch.randn(num_queries, 4)
    boxes = torch.rand(num_queries, 4) * 0.3 + 0.3
    objects = torch.rand(num_objects, 4) * 0.3 + 0.3
    return logits, boxes, torch.randint(0, 4, (num_objects,)), objects


def test_hungarian_finds_the_cheapest_assignment() -> None:
    """Against all assignments, with the costs written out from the Deformable DETR paper."""
    for seed in range(5):
        torch.manual_seed(seed)
        logits, boxes, labels, objects = scene()
        xyxy, object_xyxy = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(objects)
        found = match_hungarian(logits, xyxy, boxes, labels, object_xyxy, objects)
        p = logits.sigmoid()[:, labels]
        focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
        l1 = (boxes[:, None] - objects[None]).abs().sum(-1)
        cost = 2 * focal + 5 * l1 - 2 * generalized_box_iou(xyxy, object_xyxy)
        best = min(
            itertools.permutations(range(5), 3),
            key=lambda chosen: sum(cost[q, g].item() for g, q in enumerate(chosen)),
        )
        pairs = dict(zip(found.object_index.tolist(), found.query_index.tolist(), strict=True))
        assert tuple(pairs[g] for g in range(3)) == best


def test_by_iou_shares_objects_and_drops_bad_boxes() -> None:
    objects = torch.tensor([[0.1, 0.1, 0.5, 0.5]])
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9], [0.1, 0.1, 0.5, 0.45]])
    logits = torch.tensor([[0.0], [5.0], [3.0]])
    found = match_by_iou(logits, boxes, objects, candidates=3, min_iou=0.5)
    assert found.query_index.tolist() == [0, 2]
    assert found.object_index.tolist() == [0, 0]
    np.testing.assert_allclose(found.iou, [1.0, 0.875], atol=1e-6)
    # Only the two most confident queries are looked at.
    assert match_by_iou(logits, boxes, objects, 2, 0.5).query_index.tolist() == [2]
