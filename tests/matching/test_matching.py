import itertools

import numpy as np
import torch
from torchvision.ops import generalized_box_iou

from mfdetr_cache.matching.matchers import Matches, match_by_iou, match_hungarian
from mfdetr_cache.ops.boxes import box_iou, cxcywh_to_xyxy
from mfdetr_cache.types import ABSENT_LOGIT


def scene(num_queries: int = 5, num_objects: int = 3) -> tuple[torch.Tensor, ...]:
    logits = torch.randn(num_queries, 4)
    boxes = torch.rand(num_queries, 4) * 0.3 + 0.3
    objects = torch.rand(num_objects, 4) * 0.3 + 0.3
    return logits, boxes, torch.randint(0, 4, (num_objects,)), objects


def match(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    objects: torch.Tensor,
    preferred: np.ndarray | None = None,
) -> Matches:
    arrays = (logits.numpy(), boxes.numpy(), labels.numpy(), objects.numpy())
    return match_hungarian(*arrays, preferred)


def test_hungarian_finds_the_cheapest_assignment() -> None:
    """Against all assignments, with the costs written out from the Deformable DETR paper."""
    for seed in range(5):
        torch.manual_seed(seed)
        logits, boxes, labels, objects = scene()
        xyxy, object_xyxy = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(objects)
        found = match(logits, boxes, labels, objects)
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
        wanted = box_iou(xyxy, object_xyxy)[found.query_index, found.object_index]
        np.testing.assert_allclose(found.iou, wanted, atol=1e-6)


def test_equal_queries_give_way_to_the_ones_that_are_held() -> None:
    """Two queries a rounding error apart: the held one is taken, but never a worse one."""
    torch.manual_seed(0)
    logits, boxes, labels, objects = scene()
    first = match(logits, boxes, labels, objects)
    place = int(first.query_index[0])
    logits = torch.cat((logits, logits[place : place + 1] - 1e-6))
    boxes = torch.cat((boxes, boxes[place : place + 1]))
    held = np.sort(np.append(np.delete(first.query_index, 0), 5))
    assert match(logits, boxes, labels, objects).query_index.tolist() == first.query_index.tolist()
    found = match(logits, boxes, labels, objects, held)
    assert found.query_index.tolist() == held.tolist()
    assert sorted(found.object_index.tolist()) == [0, 1, 2]
    logits[5] -= 0.1
    worse = match(logits, boxes, labels, objects, held)
    assert worse.query_index.tolist() == first.query_index.tolist()
    few = match(logits, boxes, labels, objects, held[:2])
    assert few.query_index.tolist() == first.query_index.tolist()


def test_degenerate_boxes_have_finite_costs() -> None:
    """Boxes without area, and of negative size as a detector may write them."""
    logits = torch.zeros(3, 1)
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, -0.1, 0.2], [0.5, 0.5, 0.2, 0.2]])
    objects = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.0, 0.0]])
    found = match(logits, boxes, torch.zeros(2, dtype=torch.int64), objects)
    assert dict(zip(found.query_index.tolist(), found.object_index.tolist(), strict=True)) == {
        0: 1,
        2: 0,
    }


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


def test_absent_queries_are_never_matched() -> None:
    """As if they were not there, although they lie on the objects."""
    torch.manual_seed(0)
    logits, boxes, labels, objects = scene()
    alone = match(logits, boxes, labels, objects)
    order = torch.tensor([0, 5, 1, 6, 2, 3, 7, 4])
    logits = torch.cat((logits, torch.full((3, 4), ABSENT_LOGIT)))[order]
    boxes = torch.cat((boxes, objects))[order]
    place = order.argsort().numpy()
    for held in (None, place[alone.query_index]):
        found = match(logits, boxes, labels, objects, held)
        assert found.query_index.tolist() == place[alone.query_index].tolist()
        assert found.object_index.tolist() == alone.object_index.tolist()
        np.testing.assert_array_equal(found.iou, alone.iou)
    # More objects than queries that are there.
    logits[3:] = ABSENT_LOGIT
    assert set(match(logits, boxes, labels, objects).query_index.tolist()) == {0, 2}
    logits[:] = ABSENT_LOGIT
    assert not len(match(logits, boxes, labels, objects).query_index)
    corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(objects)
    assert not len(match_by_iou(logits, *corners, candidates=8, min_iou=0.0).query_index)
    logits[1] = 0
    assert match_by_iou(logits, *corners, candidates=8, min_iou=0.0).query_index.tolist() == [1]
