import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.point_mask import PointMask
from tests.head.test_mask_head import SMALL, randomise
from tests.support.images import make_batch, make_spec


def random_mask(num_points: int) -> tuple[PointMask, Tensor, Tensor]:
    """A PointMask in float64, coarse logits 4 x 4 and fine features 16 x 16 of two regions."""
    torch.manual_seed(0)
    mask = randomise(PointMask(5, 7, 2, num_points)).double()
    assert isinstance(mask, PointMask)
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    fine = torch.randn(2, 16, 16, 5, generator=generator, dtype=torch.float64)
    return mask, coarse, fine


def up(maps: Tensor, side: int) -> Tensor:
    """Bilinear up-sampling of (R, r, r)."""
    return functional.interpolate(maps[:, None], (side, side), mode="bilinear")[:, 0]


def mlp(mask: PointMask, cell: Tensor, coarse: Tensor) -> Tensor:
    """One point: every layer sees the coarse logit beside the features (PointRend, section 3.3)."""
    for layer in mask.layers:
        assert isinstance(layer, nn.Linear)
        cell = (layer.weight @ torch.cat((cell, coarse[None])) + layer.bias).clamp(min=0)
    return mask.last.weight[0] @ torch.cat((cell, coarse[None])) + mask.last.bias[0]


def test_with_points_enough_every_cell_is_predicted_from_its_own_features() -> None:
    mask, coarse, fine = random_mask(16 * 16)
    found = mask(coarse, fine)
    assert found.shape == (2, 16, 16)
    there = up(coarse, 16)
    for region, y, x in [(0, 0, 0), (0, 7, 12), (1, 15, 3), (1, 8, 8)]:
        wanted = mlp(mask, fine[region, y, x], there[region, y, x])
        torch.testing.assert_close(found[region, y, x], wanted, rtol=0, atol=1e-12)


def test_subdivision_replaces_the_least_certain_points_alone() -> None:
    """Section 3.1, one cell after the other, with 6 points at 8 x 8 and at 16 x 16."""
    mask, coarse, fine = random_mask(6)
    found = mask(coarse, fine)
    for region in range(2):
        logits = coarse[region]
        for side in (8, 16):
            logits = up(logits[None], side)[0]
            cells = [(abs(logits[y, x].item()), y, x) for y in range(side) for x in range(side)]
            for _, y, x in sorted(cells)[:6]:
                # The centre of a cell lies in one fine cell, or between four of them.
                at = (
                    slice(y * 16 // side, (y + 1) * 16 // side),
                    slice(x * 16 // side, (x + 1) * 16 // side),
                )
                features = fine[region][at].flatten(0, 1).mean(0)
                logits[y, x] = mlp(mask, features, up(coarse, side)[region, y, x])
        torch.testing.assert_close(found[region], logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sides", "wanted"),
    [((4, 16), [(8, 20), (16, 20)]), ((2, 6), [(4, 16), (6, 20)]), ((7, 224), 5)],
)
def test_subdivisions_double_the_side(
    sides: tuple[int, int], wanted: list[tuple[int, int]] | int
) -> None:
    found = list(PointMask(1, 1, 0, 20).subdivisions(*sides))
    assert (len(found) if isinstance(wanted, int) else found) == wanted


def test_training_predicts_the_points_that_are_asked_for() -> None:
    """The coarse mask and what is predicted at points reach every weight; evaluation the same."""
    config = dataclasses.replace(
        SMALL, fine_size=16, fine_block="points", fine_points=256, mask_scoring=False
    )
    head = randomise(build_head(config, make_spec())).double()
    batch = make_batch(make_spec(), [(96, 128), (64, 64)], dtype=torch.float64)
    output = head(batch)
    assert output.mask_logits.shape == (6, 8, 8)
    centres = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    points = torch.cartesian_prod(centres, centres).flip(1).expand(6, -1, -1)
    refined = output.refine(points)
    (output.mask_logits.square().mean() + refined.square().mean()).backward()
    idle = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert [n for n in idle if not n.endswith("key.bias")] == []
    whole = head.eval()(batch)
    torch.testing.assert_close(whole.coarse_logits, output.mask_logits, rtol=0, atol=1e-10)
    wanted = refined.unflatten(1, (16, 16))
    torch.testing.assert_close(whole.mask_logits, wanted, rtol=0, atol=1e-10)
