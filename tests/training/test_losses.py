import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mfdetr_cache.head.batch import HeadOutput
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.matching.objects import trainable_objects
from mfdetr_cache.ops.masks import decode_run_lengths
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.losses import (
    dice_loss,
    head_losses,
    mask_iou_targets,
    sample_at,
    uncertain_points,
)
from mfdetr_cache.training.optimisers import learning_rate
from mfdetr_cache.training.regions import RegionSettings, RegionTargets, build_regions
from mfdetr_cache.types import CachedImage
from tests.support.images import make_ground_truth, make_image, make_spec
from tests.support.rectangles import runs_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sampling_at_cell_centres_gives_the_cells() -> None:
    grid = torch.rand(2, 5, 5)
    steps = (torch.arange(5) + 0.5) / 5
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    points = torch.stack((x, y), -1).flatten(0, 1).expand(2, -1, -1)
    assert torch.allclose(sample_at(grid, points), grid.flatten(1), atol=1e-6)


def test_points_gather_where_the_mask_is_uncertain() -> None:
    ramp = torch.linspace(-8, 8, 32).expand(3, 32, 32)
    points = uncertain_points(ramp, 200, 3.0, 0.75, generator())
    assert points.shape == (3, 200, 2)
    assert points.min() >= 0
    assert points.max() <= 1
    near = ((points[..., 0] - 0.5).abs() < 0.25).float().mean()
    # A quarter is uniform (half of it near); three quarters are the best third of 3 N candidates,
    # which for a ramp lie within 1/8 of the zero line.
    assert near > 0.8


def test_dice_of_equal_and_disjoint_masks() -> None:
    half = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert dice_loss(half, half).item() == pytest.approx(0)
    assert dice_loss(half, 1 - half).item() == pytest.approx(1 - 1 / 5)


def test_iou_target_counts_what_the_box_misses() -> None:
    logits = torch.full((1, 4, 4), -1.0)
    logits[:, :2] = 1.0
    masks = torch.zeros(1, 8, 8)
    masks[:, :, :4] = 1.0
    # Prediction: top half. Object: left half, and as much again outside the box.
    target = mask_iou_targets(logits, masks, torch.tensor([0.5]))
    assert target.item() == pytest.approx(0.25 / (0.5 + 0.5 + 0.5 - 0.25))


def outputs(count: int = 4) -> tuple[HeadOutput, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(count, 8, 8, requires_grad=True)
    iou = torch.rand(count, 3, requires_grad=True)
    masks = (torch.rand(count, 16, 16) > 0.5).float()
    return HeadOutput(logits, iou), masks, torch.arange(count) % 3, torch.zeros(count)


def test_grid_loss_equals_cross_entropy_and_dice_of_all_cells() -> None:
    output, masks, labels, outside = outputs()
    config = TrainConfig(points="grid", target_scale=2)
    losses = head_losses(output, masks, labels, outside, config, generator())
    wanted = masks.reshape(4, 8, 2, 8, 2).mean((2, 4)).flatten(1)
    probs = output.mask_logits.detach().sigmoid().flatten(1)
    bce = -(wanted * probs.log() + (1 - wanted) * (1 - probs).log()).mean()
    assert losses.bce.item() == pytest.approx(bce.item(), rel=1e-5)
    assert losses.dice.item() == pytest.approx(dice_loss(probs, wanted).mean().item(), rel=1e-5)
    total = 5 * losses.bce + 5 * losses.dice + losses.scoring
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-6)


def test_the_coarse_mask_of_a_finer_one_adds_its_own_loss() -> None:
    output, masks, labels, outside = outputs()
    coarse = torch.randn(4, 4, 4)
    config = TrainConfig(points="grid", scoring_weight=0, coarse_weight=0.5)

    def total(given: HeadOutput) -> float:
        return head_losses(given, masks, labels, outside, config, generator()).total.item()

    both = total(dataclasses.replace(output, coarse_logits=coarse))
    alone = total(output), total(HeadOutput(coarse, None))
    assert both == pytest.approx(alone[0] + 0.5 * alone[1], rel=1e-6)


def test_single_points_add_their_own_loss() -> None:
    """Where the coarse mask is least certain, with points of their own; as much as the mask's."""
    output, masks, labels, outside = outputs()
    config = TrainConfig(scoring_weight=0)
    drawn = generator()
    first, second = (
        head_losses(output, masks, labels, outside, config, drawn).total.item() for _ in range(2)
    )
    assert first != second
    asked: list[torch.Tensor] = []

    def refine(points: torch.Tensor) -> torch.Tensor:
        asked.append(points)
        return sample_at(output.mask_logits, points)

    refined = dataclasses.replace(output, refine=refine)
    both = head_losses(refined, masks, labels, outside, config, generator()).total.item()
    assert both == pytest.approx(first + second, rel=1e-6)
    assert [points.shape for points in asked] == [(4, 16, 2)]


def test_scoring_trains_only_the_objects_label() -> None:
    output, masks, labels, outside = outputs()
    config = TrainConfig(bce_weight=0, dice_weight=0)
    head_losses(output, masks, labels, outside, config, generator()).total.backward()
    assert output.mask_iou is not None
    assert output.mask_iou.grad is not None
    touched = output.mask_iou.grad != 0
    assert touched.sum() == 4
    assert touched[torch.arange(4), labels].all()


def test_no_region_has_no_loss() -> None:
    output, masks, labels, outside = outputs()
    empty = HeadOutput(output.mask_logits[:0], output.mask_iou[:0])  # type: ignore[index]
    with pytest.raises(ValueError, match="without regions"):
        head_losses(empty, masks[:0], labels[:0], outside[:0], TrainConfig(), generator())


def test_points_depend_on_the_generator_alone() -> None:
    output, masks, labels, outside = outputs()
    first, again, other = (
        head_losses(output, masks, labels, outside, TrainConfig(), generator(s)).bce.item()
        for s in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_schedule_steps_and_cosine() -> None:
    config = TrainConfig(steps=200, lr=1.0, warmup_steps=10)
    assert [learning_rate(config, s) for s in (0, 9, 10, 179)] == [0.1, 1.0, 1.0, 1.0]
    assert learning_rate(config, 180) == pytest.approx(0.1)
    assert learning_rate(config, 190) == pytest.approx(0.01)
    cosine = dataclasses.replace(config, schedule="cosine", warmup_steps=0)
    assert learning_rate(cosine, 100) == pytest.approx(0.5)
    assert learning_rate(cosine, 200) == pytest.approx(0.0)


def regions_of(image: CachedImage, **changes: Any) -> RegionTargets:
    settings = RegionSettings.of(TrainConfig(**changes), HeadConfig(roi_size=8))
    return build_regions(image, settings, np.random.default_rng(0))


def test_a_perfect_mask_over_the_whole_image_has_no_loss() -> None:
    """A head without RoIAlign gives masks over the image, in cells of four input pixels."""
    image = make_image(make_spec())
    truth, (height, width) = image.ground_truth, image.geometry.original_hw
    # A rectangle of whole cells, which are five pixels wide here: each is inside or outside.
    bitmap = np.zeros((height, width), dtype=bool)
    bitmap[20:80, 30:120] = True
    truth = dataclasses.replace(truth, run_lengths=(runs_of(bitmap),) * len(truth))
    train = TrainConfig(points="grid")
    head = HeadConfig(roialign=False, box_layers=0, query_b2o=False, mask_scoring=False)
    drawn = dataclasses.replace(image, ground_truth=truth)
    settings = RegionSettings.of(train, head)
    regions = build_regions(drawn, settings, np.random.default_rng(0))
    assert regions.masks.shape == (len(regions), 24, 32)
    # Padding has cells, too, which are of nothing.
    geometry = dataclasses.replace(image.geometry, input_hw=(128, 192))
    padded = dataclasses.replace(drawn, geometry=geometry)
    more = build_regions(padded, settings, np.random.default_rng(0)).masks
    assert more.shape == (len(regions), 32, 48)
    assert (more[:, :24, :32] == regions.masks).all()
    assert more.sum() == regions.masks.sum()
    assert (regions.masks == bitmap.reshape(24, 5, 32, 5).mean(axis=(1, 3))).all()
    assert (regions.outside == 0).all()
    masks, labels, outside = (
        torch.from_numpy(a) for a in (regions.masks, regions.labels, regions.outside)
    )
    perfect = HeadOutput(100 * (masks - 0.5), None)
    losses = head_losses(perfect, masks, labels, outside, train, generator())
    assert losses.total.item() == pytest.approx(0, abs=1e-6)
    inverted = HeadOutput(-perfect.mask_logits, None)
    assert head_losses(inverted, masks, labels, outside, train, generator()).total > 100


def test_regions_carry_the_mask_inside_the_predicted_box() -> None:
    image = make_image(make_spec())
    regions = regions_of(image, min_match_iou=0.5, target_scale=2)
    assert sorted(regions.query_index.tolist()) == [0, 1]
    for region, query in enumerate(regions.query_index):
        mask = decode_run_lengths(image.ground_truth.run_lengths[query], image.geometry.original_hw)
        # The queries' boxes are the objects' own, so nothing is outside.
        assert regions.outside[region] < 0.05
        x0, y0, x1, y1 = image.ground_truth.boxes_xyxy[query].astype(int)
        assert regions.masks[region].mean() == pytest.approx(mask[y0:y1, x0:x1].mean(), abs=0.05)


def test_a_set_has_the_best_queries_and_all_objects_unmatched() -> None:
    image = make_image(make_spec())
    regions = regions_of(image, match="set", iou_candidates=3)
    assert regions.objects is not None
    best = np.argsort(-image.class_logits.max(1), kind="stable")[:3]
    assert sorted(best) == regions.query_index.tolist()
    objects = trainable_objects(image.ground_truth)
    assert regions.objects.class_cost.shape == (3, len(objects))
    height, width = image.geometry.original_hw
    scale = [width, height, width, height]
    boxes = image.ground_truth.boxes_xyxy[objects]
    np.testing.assert_allclose(regions.objects.boxes_xyxy_norm * scale, boxes, rtol=1e-5)
    for found, index in zip(regions.masks, objects, strict=True):
        mask = decode_run_lengths(image.ground_truth.run_lengths[index], (height, width))
        x0, y0, x1, y1 = image.ground_truth.boxes_xyxy[index].astype(int)
        assert found.shape == (28, 28)
        assert found.mean() == pytest.approx(mask[y0:y1, x0:x1].mean(), abs=0.05)
    # Images without an object have the shapes of the others.
    assert regions_of(without_objects(image), match="set").masks.shape == (0, 28, 28)


def without_objects(image: CachedImage) -> CachedImage:
    truth = image.ground_truth
    truth = dataclasses.replace(truth, is_crowd=np.ones_like(truth.is_crowd))
    return dataclasses.replace(image, ground_truth=truth)


def test_jitter_moves_boxes_and_their_targets_together() -> None:
    image = make_image(make_spec())
    still = regions_of(image)
    moved = regions_of(image, box_jitter=0.2)
    assert (still.query_index == moved.query_index).all()
    assert np.abs(still.boxes_xyxy_norm - moved.boxes_xyxy_norm).max() > 0.01
    assert np.abs(still.masks - moved.masks).max() > 0


def test_crowds_and_unknown_categories_are_not_trained_on() -> None:
    truth = make_ground_truth((120, 160), count=3)
    truth.is_crowd[0] = True
    truth.labels[1] = -1
    assert trainable_objects(truth).tolist() == [2]
    truth.is_crowd[2] = True
    image = make_image(make_spec(), ground_truth=truth)
    assert len(regions_of(image)) == 0


def test_empty_images_have_no_regions() -> None:
    image = make_image(make_spec(), ground_truth=make_ground_truth((120, 160), count=0))
    regions = regions_of(image)
    assert regions.masks.shape == (0, 16, 16)


def test_regions_per_image_can_be_bounded() -> None:
    image = make_image(make_spec(), ground_truth=make_ground_truth((120, 160), count=6, seed=2))
    assert len(regions_of(image, max_regions=2)) == 2
