import itertools

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou

from mfdetr_cache.errors import TrainingError
from mfdetr_cache.head.batch import RefinedRegions
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.mask_embedding import LinearCodec
from mfdetr_cache.matching.matchers import focal_cost
from mfdetr_cache.matching.pair_costs_numba import pair_costs
from mfdetr_cache.training.config import TrainConfig
from mfdetr_cache.training.learner import build_learner
from mfdetr_cache.training.losses import dice_loss
from mfdetr_cache.training.recipes import build_recipe
from mfdetr_cache.training.regions import SetTargets
from mfdetr_cache.training.set_loss import match_set, set_losses
from tests.support.images import make_spec


def boxes(count: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=random) * 0.5
    return torch.cat((corner, corner + 0.1 + 0.3 * torch.rand(count, 2, generator=random)), 1)


def targets(regions: int, objects: int, seed: int) -> SetTargets:
    cost = np.random.default_rng(seed).normal(size=(regions, objects)).astype(np.float32)
    return SetTargets(boxes(objects, seed).numpy(), cost, (100, 200))


def test_the_class_cost_is_the_detectors() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(scale=4, size=(6, 5)).astype(np.float32)
    labels = np.array([3, 0, 3])
    place = np.full((6, 4), 0.5, np.float32)
    cost, _ = pair_costs(logits, place, labels, place[:3], (1.0, 0.25, 2.0), (0.0, 0.0))
    np.testing.assert_allclose(focal_cost(logits[:, labels]), cost, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objects", [2, 4])
def test_matching_has_the_least_cost_of_all_assignments(objects: int) -> None:
    """Every assignment of 4 regions tried, the cost written out pair by pair."""
    image = targets(4, objects, 1)
    found, codes, wanted = boxes(4, 2), torch.randn(4, 6), torch.randn(objects, 6)
    truth = torch.from_numpy(image.boxes_xyxy_norm)

    def cost(r: int, o: int) -> float:
        cosine = torch.dot(codes[r], wanted[o]) / (codes[r].norm() * wanted[o].norm())
        giou = generalized_box_iou(found[r : r + 1], truth[o : o + 1])
        l1 = (found[r] - truth[o]).abs().sum()
        classes = 2 * image.class_cost[r, o]
        return float(5 * l1 - 2 * giou - (cosine + 1) + classes)

    best = min(
        itertools.permutations(range(4), objects),
        key=lambda order: sum(cost(r, o) for o, r in enumerate(order)),
    )
    region, matched = match_set(found, codes, image, wanted)
    assert {int(o): int(r) for r, o in zip(region, matched, strict=True)} == dict(enumerate(best))


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_the_loss_is_that_of_the_pairs_of_every_stage(kind: str) -> None:
    """Two images and one without objects between; boxes and codes near those of chosen objects."""
    torch.manual_seed(0)
    images = [targets(3, 2, 5), targets(2, 1, 6)]
    masks = (torch.rand(3, 28, 28) > 0.5).float()
    codec = LinearCodec(8)
    codes = codec.encode(masks)
    scale = torch.tensor([200.0, 100.0, 200.0, 100.0])
    truth = torch.from_numpy(np.concatenate([i.boxes_xyxy_norm for i in images]))
    # Regions 0, 1, 2 of the first image and 3, 4 of the second; objects 0, 1 and 2.
    chosen = {0: 2, 1: 0, 2: 4}
    for image in images:
        image.class_cost[:] = 0
    stages = []
    for noise in (0.02, 0.01):
        place, code = boxes(5, 7) + 2, torch.randn(5, 8)
        for target, region in chosen.items():
            place[region] = truth[target] + noise * torch.rand(4)
            code[region] = codes[target] + noise * torch.randn(8)
        stages.append(RefinedRegions(place * scale, code))
    config = TrainConfig(match="set", embedding_weight=3.0, dice_weight=4.0, embedding_loss=kind)  # type: ignore[arg-type]
    found = set_losses(stages, (3, 0, 2), images, masks, codec, config, share=10)
    wanted = 0.0
    for stage in stages:
        for target, region in chosen.items():
            box, code = stage.boxes_xyxy[region] / scale, stage.codes[region]
            apart = (
                1 - torch.cosine_similarity(code, codes[target], dim=0)
                if kind == "cosine"
                else (code - codes[target]).square().mean()
            )
            giou = generalized_box_iou(box[None], truth[target][None])[0, 0]
            decoded = codec.decode(code[None]).sigmoid().flatten(1)
            dice = dice_loss(decoded, masks[target].flatten()[None])[0]
            l1 = (box - truth[target]).abs().sum()
            wanted += float(5 * l1 + 2 * (1 - giou) + 3 * apart + 4 * dice)
    assert found.total.item() == pytest.approx(wanted / 10, rel=1e-4)


@pytest.mark.parametrize("settings", [{"match": "iou"}, {"mask_predictor": "embedding"}])
def test_a_head_that_moves_boxes_is_matched_by_its_loss(settings: dict[str, str]) -> None:
    recipe = build_recipe("istr_stages", {"hidden_dim": "16", **settings})
    with pytest.raises(TrainingError, match="mask_predictor=refined and match=set go together"):
        build_learner(
            recipe.train, lambda: build_head(recipe.head, make_spec()), torch.device("cpu")
        )
