"""Training from crops of C1 is training from the map."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from mfdetr_cache.head.batch import HeadBatch
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.c1_crops import moments_of
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.ops.roi_align import RoIAlign
from tests.support.images import make_batch, make_spec

SIZES = [(96, 128), (64, 96), (96, 128)]


def as_crops(batch: HeadBatch, config: HeadConfig) -> HeadBatch:
    """The same batch with crops and moments in place of C1."""
    groups, crops = [], torch.zeros(len(batch.queries), config.grid_size, config.grid_size, 24)
    crops = crops.double()
    for group in batch.groups:
        c1 = group.maps["c1"]
        crops = (
            crops.new_zeros(*crops.shape[:3], c1.shape[1])
            if crops.shape[3] != c1.shape[1]
            else crops
        )
        for place, image in enumerate(group.members):
            inside = (batch.image_index == image).nonzero()[:, 0]
            boxes = batch.boxes_xyxy[inside]
            rois = torch.cat((torch.zeros(len(boxes), 1, dtype=boxes.dtype), boxes), dim=1)
            size = (config.grid_size, config.grid_size)
            ratio = config.roi_sampling_ratio or -1
            found = roi_align(c1[place : place + 1], rois, size, 1 / 4, ratio, aligned=True)
            crops[inside] = found.permute(0, 2, 3, 1)
        groups.append(
            replace(
                group,
                maps={k: v for k, v in group.maps.items() if k != "c1"},
                c1_moments=moments_of(c1),
                c1_hw=tuple(c1.shape[-2:]),
            )
        )
    return replace(batch, groups=tuple(groups), c1_crops=crops)


@pytest.mark.parametrize(
    ("changes", "c1_channels"),
    [
        ({}, 24),
        ({"roi_size": 16}, 24),
        ({"fine_size": 16}, 24),
        ({"roi_sampling_ratio": 2}, 24),
        ({"neck": False}, 32),
        ({"hidden_dim": 32}, 24),
        ({"fuse_stride": 16}, 24),
    ],
)
def test_outputs_and_gradients_are_those_of_the_whole_map(
    changes: dict[str, object], c1_channels: int
) -> None:
    """In float64, boxes inside, at and beyond the border: both orders agree to rounding.

    The group norm's variance comes from a difference of moments here, which costs a few digits of
    sixteen; 1e-9 is a thousand times above what is seen and far below any wrong term.
    """
    spec = make_spec(c1_channels=c1_channels)
    config = replace(HeadConfig(hidden_dim=16, roi_size=8), **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    head = build_head(config, spec).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = make_batch(spec, SIZES, dtype=torch.float64)
    boxes = batch.boxes_xyxy.clone()
    boxes[0] = torch.tensor([-20.0, -10.0, 40.0, 50.0])  # beyond the top left corner
    boxes[1] = torch.tensor([100.0, 60.0, 150.0, 110.0])  # beyond the bottom right one
    boxes[3] = torch.tensor([0.0, 0.0, 96.0, 64.0])  # exactly the image
    batch = replace(batch, boxes_xyxy=boxes)

    def run(given: HeadBatch) -> tuple[torch.Tensor, torch.Tensor]:
        head.zero_grad()
        # The whole map is computed, as for evaluation, where there are no crops.
        head.train(given.c1_crops is not None)
        output = head(given)
        loss = output.mask_logits.tanh().square().sum()
        loss.backward()
        assert output.mask_iou is not None
        grads = [p.grad.flatten() for p in head.parameters() if p.grad is not None]
        return output.mask_logits.detach(), torch.cat(grads)

    whole, whole_grad = run(batch)
    crops, crops_grad = run(as_crops(batch, config))
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(crops, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(crops_grad, whole_grad, rtol=1e-9, atol=1e-9)


def test_a_batch_with_c1_cropped_beforehand_gives_the_same() -> None:
    """Bit for bit: the same is done, only earlier. An image without regions stays as it is."""
    spec = make_spec(c1_channels=24)
    torch.manual_seed(0)
    head = build_head(HeadConfig(hidden_dim=16, roi_size=8), spec).train()
    batch = make_batch(spec, [(96, 128), (64, 96), (96, 128), (64, 128)])
    kept = (batch.image_index != 3).nonzero()[:, 0]
    kept = kept[torch.randperm(len(kept))]
    batch = replace(
        batch,
        queries=batch.queries[kept],
        boxes_xyxy=batch.boxes_xyxy[kept],
        image_index=batch.image_index[kept],
    )
    cut = head.prepare(batch)
    assert cut.c1_crops is not None
    assert ["c1" in group.maps for group in cut.groups] == [False, False, True]
    results = []
    for given in (batch, cut):
        head.zero_grad()
        output = head(given)
        output.mask_logits.tanh().square().sum().backward()
        grads = [p.grad.flatten() for p in head.parameters() if p.grad is not None]
        results.append((output.mask_logits.detach(), torch.cat(grads)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_coverage_is_the_align_of_ones(ratio: int) -> None:
    generator = torch.Generator().manual_seed(ratio)
    corners = torch.rand(200, 2, 2, generator=generator, dtype=torch.float64) * 150 - 40
    boxes = corners.sort(dim=1).values.flatten(1)
    boxes[0, 2:] = boxes[0, :2]  # a point
    ones = torch.ones(1, 1, 13, 17, dtype=torch.float64)
    rois = torch.cat((torch.zeros(200, 1, dtype=torch.float64), boxes), dim=1)
    wanted = roi_align(ones, rois, (8, 8), 1 / 4, ratio or -1, aligned=True)[:, 0]
    sizes = np.full((200, 2), (13, 17))
    down, across = torch.from_numpy(RoIAlign(8, 4, ratio).coverage(boxes.numpy(), sizes))
    torch.testing.assert_close(down[:, :, None] * across[:, None], wanted, rtol=0, atol=1e-12)
    assert 0 < float((wanted == 0).double().mean()) < 1
    assert float((wanted == 1).double().mean()) > 0.1


def test_coverage_is_what_makes_it_exact_at_the_border() -> None:
    """Guards the test above: without the coverage term, boxes beyond the border differ."""
    ones = torch.ones(1, 1, 16, 16, dtype=torch.float64)
    roi = torch.tensor([[0.0, -20.0, -20.0, 20.0, 20.0]], dtype=torch.float64)
    coverage = roi_align(ones, roi, (8, 8), 1 / 4, 2, aligned=True)
    assert coverage.min() == 0
    assert coverage.max() == 1
