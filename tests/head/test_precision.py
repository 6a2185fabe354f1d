"""The same function in other precisions, and compiled."""

import copy

import pytest
import torch

from mfdetr_cache.head.batch import HeadBatch, MapGroup
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.training.learner import autocast
from tests.support.images import make_batch, make_spec

SMALL = HeadConfig(hidden_dim=16, roi_size=8)


def single(batch: HeadBatch) -> HeadBatch:
    groups = tuple(
        MapGroup({k: v.float() for k, v in g.maps.items()}, g.input_hw, g.members)
        for g in batch.groups
    )
    return HeadBatch(groups, batch.queries.float(), batch.boxes_xyxy.float(), batch.image_index)


@pytest.fixture
def made() -> tuple[MaskHead, HeadBatch]:
    spec = make_spec()
    torch.manual_seed(1)
    head = build_head(SMALL, spec).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return head, make_batch(spec, [(96, 128), (64, 64)], dtype=torch.float64)


@pytest.mark.parametrize(("amp", "bits"), [("off", 24), ("bf16", 8)])
def test_rounding_stays_rounding(made: tuple[MaskHead, HeadBatch], amp: str, bits: int) -> None:
    """Against float64, root mean square over all cells, relative to the logits' own.

    About thirty products and sums follow one another, each rounded to ``bits`` bits: as a random
    walk sqrt(30) * 2^-bits of a value's size, and four times that as the bound. A coordinate
    rounded to bfloat16, or a norm computed in it, is above it.
    """
    head, batch = made
    wanted = head(batch).mask_logits
    rounded = copy.deepcopy(head).float()
    with autocast(amp, torch.device("cpu")):  # type: ignore[arg-type]
        found = rounded(single(batch)).mask_logits
    error = (found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error <= 4 * 30**0.5 * 2.0**-bits


def test_compiled_equals_eager(made: tuple[MaskHead, HeadBatch]) -> None:
    """Captured forward and backward graphs, without code generation (minutes on two cores)."""
    head, batch = made
    eager, compiled = copy.deepcopy(head), copy.deepcopy(head)
    compiled.box_encoder = torch.compile(compiled.box_encoder, backend="aot_eager")  # type: ignore[assignment]
    one, two = eager(batch), compiled(batch)
    torch.testing.assert_close(two.mask_logits, one.mask_logits, rtol=0, atol=1e-10)
    one.mask_logits.square().sum().backward()
    two.mask_logits.square().sum().backward()
    for (name, first), second in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        if first.grad is not None:
            torch.testing.assert_close(second.grad, first.grad, rtol=1e-8, atol=1e-8, msg=name)
