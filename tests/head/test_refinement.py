import dataclasses

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from mfdetr_cache.head.batch import HeadBatch
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.head.refinement import Refinement, moved_boxes
from tests.head.test_mask_head import randomise
from tests.support.images import make_batch, make_spec

SMALL = HeadConfig(
    hidden_dim=16,
    roi_size=8,
    image_layers=1,
    box_layers=0,
    query_ffn=False,
    query_b2o=False,
    mask_scoring=False,
    mask_predictor="refined",
    mask_embedding_dim=10,
    refinement_stages=2,
)


def build(**changes: object) -> MaskHead:
    torch.manual_seed(0)
    head = randomise(build_head(dataclasses.replace(SMALL, **changes), make_spec())).double()  # type: ignore[arg-type]
    assert isinstance(head, MaskHead)
    return head


def batch_of(*sizes: tuple[int, int]) -> HeadBatch:
    return make_batch(make_spec(), list(sizes), dtype=torch.float64)


def test_boxes_move_as_torchvisions_do() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(20, 2, generator=generator) * 100
    boxes = torch.cat((corner, corner + 1 + 50 * torch.rand(20, 2, generator=generator)), 1)
    deltas = torch.randn(20, 4, generator=generator)
    wanted = BoxCoder((2.0, 2.0, 1.0, 1.0)).decode_single(deltas, boxes)
    torch.testing.assert_close(moved_boxes(boxes, deltas), wanted)


def test_a_fresh_head_leaves_the_detectors_boxes() -> None:
    batch = batch_of((96, 128))
    output = build_head(SMALL, make_spec()).double()(batch)
    assert len(output.stages) == 2
    for stage in output.stages:
        torch.testing.assert_close(stage.boxes_xyxy, batch.boxes_xyxy, rtol=0, atol=1e-10)


def test_a_stage_looks_at_the_boxes_of_the_one_before() -> None:
    """One image, stage by stage, with RoIAlign by torchvision; masks are the last stage's."""
    head, batch = build(), batch_of((96, 128))
    output = head(batch)
    assert isinstance(head.predictor, Refinement)
    fused = head.fuse(batch.groups[0])
    queries = head.map_query(batch.queries) + fused.mean(dim=(2, 3))
    boxes: Tensor = batch.boxes_xyxy
    image = torch.zeros(len(boxes), dtype=torch.long)
    for stage, found in zip(head.predictor, output.stages, strict=True):
        rois = torch.cat((image[:, None].double(), boxes), dim=1)
        regions = head.align.with_torchvision(fused, rois)
        queries, deltas, codes = stage(queries, regions, image)
        assert deltas.abs().max() > 0.01
        boxes = moved_boxes(boxes, deltas).detach()
        torch.testing.assert_close(found.boxes_xyxy, boxes, rtol=0, atol=1e-8)
        torch.testing.assert_close(found.codes, codes, rtol=0, atol=1e-8)
    wanted = head.predictor.codec.decode(output.stages[-1].codes)
    torch.testing.assert_close(output.mask_logits, wanted)


def test_images_do_not_see_one_another() -> None:
    head, both = build(), batch_of((96, 128), (64, 64))
    together = head(both).stages[-1]
    for index in range(2):
        mine = both.image_index == index
        alone = HeadBatch(
            groups=(dataclasses.replace(both.groups[index], members=(0,)),),
            queries=both.queries[mine],
            boxes_xyxy=both.boxes_xyxy[mine],
            image_index=both.image_index[mine] * 0,
        )
        found = head(alone).stages[-1]
        torch.testing.assert_close(found.codes, together.codes[mine], rtol=0, atol=1e-8)
        torch.testing.assert_close(found.boxes_xyxy, together.boxes_xyxy[mine], rtol=0, atol=1e-8)


def test_every_weight_learns() -> None:
    head = build()
    output = head(batch_of((96, 128)))
    total = sum(s.codes.square().mean() + s.boxes_xyxy.square().mean() for s in output.stages)
    assert isinstance(total, Tensor)
    total.backward()
    idle = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().any()]
    # The key bias of self-attention shifts a softmax and has gradient zero by theory.
    assert [n for n in idle if not n.endswith("key.bias")] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box_layers": 1}, "no place for box_layers"),
        ({"fine_size": 16}, "a mask_predictor that is no code"),
        ({"refinement_stages": 0}, "refinement_stages must be 1 to 12"),
    ],
)
def test_what_has_no_place_beside_the_stages_is_refused(
    changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
