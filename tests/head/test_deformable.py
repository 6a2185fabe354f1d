import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mfdetr_cache.head.blocks.deformable import (
    MultiScaleDeformableAttention,
    cell_centres,
    deformable_attention,
)
from mfdetr_cache.ops.deformable_attention import (
    packed_attention,
    sampled_attention,
    softmax_over_points,
)
from mfdetr_cache.ops.packed_levels import PackedLevels

SIZES = ((4, 5), (2, 3))


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = torch.randn(2, 26, 2, 3, dtype=dtype, requires_grad=True)
    locations = (torch.rand(2, 7, 2, 2, 3, 2, dtype=dtype) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand(2, 7, 2, 2, 3, dtype=dtype, requires_grad=True)
    return value, locations, weights


def by_definition(
    value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Equation 3 of Deformable DETR, cell by cell."""
    batch, _, heads, width = value.shape
    out = torch.zeros(batch, locations.shape[1], heads, width, dtype=value.dtype)
    start = 0
    for level, (height, breadth) in enumerate(SIZES):
        for index in torch.cartesian_prod(
            torch.arange(batch),
            torch.arange(locations.shape[1]),
            torch.arange(heads),
            torch.arange(3),
        ):
            b, n, h, p = index.tolist()
            x = locations[b, n, h, level, p, 0].item() * breadth - 0.5
            y = locations[b, n, h, level, p, 1].item() * height - 0.5
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    if 0 <= row < height and 0 <= column < breadth:
                        share = (1 - abs(x - column)) * (1 - abs(y - row))
                        cell = value[b, start + row * breadth + column, h]
                        out[b, n, h] += weights[b, n, h, level, p] * share * cell
        start += height * breadth
    return out.flatten(2)


@pytest.mark.parametrize("attention", [deformable_attention, sampled_attention])
def test_equals_the_definition(attention: Callable[..., torch.Tensor]) -> None:
    value, locations, weights = inputs()
    found = attention(value, SIZES, locations, weights)
    assert torch.allclose(found, by_definition(value, locations, weights), atol=1e-12)


@pytest.mark.parametrize("attention", [deformable_attention, sampled_attention])
def test_gradients_are_right(attention: Callable[..., torch.Tensor]) -> None:
    def function(v: torch.Tensor, loc: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return attention(v, SIZES, loc, w)

    assert torch.autograd.gradcheck(function, inputs())


def test_kernels_and_operators_agree() -> None:
    """At the network's own sizes, locations on and beyond all borders, in float64."""
    sizes = ((13, 17), (7, 9), (4, 5))
    tokens = sum(h * w for h, w in sizes)
    value = torch.randn(2, tokens, 8, 32, dtype=torch.float64, requires_grad=True)
    locations = (torch.rand(2, 50, 8, 3, 4, 2, dtype=torch.float64) * 1.6 - 0.3).requires_grad_()
    weights = torch.rand(2, 50, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    above = torch.randn(2, 50, 256, dtype=torch.float64)
    results = []
    for attention in (deformable_attention, sampled_attention):
        found = attention(value, sizes, locations, weights)
        grads = torch.autograd.grad(found, (value, locations, weights), above)
        results.append((found, *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernels", [True, False])
def test_packed_images_are_images_alone(*, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of different sizes, one without queries: results and gradients of each by itself."""
    if not kernels:
        monkeypatch.setattr(
            "mfdetr_cache.ops.deformable_attention._kernels_for", lambda _value: None
        )
    sizes = (((4, 5), (2, 3)), ((1, 2), (3, 3)), ((7, 6), (1, 1)))
    counts, tokens = (70, 0, 9), (26, 11, 43)
    value = torch.randn(sum(tokens), 2, 3, dtype=torch.float64, requires_grad=True)
    locations = (torch.rand(79, 2, 2, 3, 2, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand(79, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    images = torch.tensor([0] * 70 + [2] * 9)
    levels = PackedLevels.of(sizes, torch.device("cpu"))
    assert torch.equal(levels.images.bincount(), torch.tensor(tokens))
    found = packed_attention(value, levels.for_queries(images), locations, weights)
    split = (value.split(tokens), locations.split(counts), weights.split(counts))
    wanted = torch.cat(
        [
            sampled_attention(v[None], s, at[None], w[None])[0]
            for s, v, at, w in zip(sizes, *split, strict=True)
        ]
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    above = torch.randn_like(wanted)
    inputs = (value, locations, weights)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, above),
        torch.autograd.grad(wanted, inputs, above),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    value, locations, weights = inputs(torch.float32)
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        found = deformable_attention(value, SIZES, locations, weights)
        grads = torch.autograd.grad(found.square().sum(), (value, locations, weights))
        results.append((found, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_location_that_is_no_number_is_not_overlooked() -> None:
    value, locations, weights = inputs()
    with torch.no_grad():
        locations[1, 3, 0, 0, 0, 1] = float("nan")
        found = deformable_attention(value, SIZES, locations, weights)
    assert found[1, 3].isnan().any()
    assert not found[0].isnan().any()


@pytest.mark.filterwarnings("ignore:.*jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
def test_graphs_are_captured_with_operators() -> None:
    """A traced graph must hold operators: the kernels cannot leave this process."""
    value, locations, weights = (t.detach().float() for t in inputs())

    def function(v: torch.Tensor, loc: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return deformable_attention(v, SIZES, loc, w)

    traced = torch.jit.trace(function, (value, locations, weights))
    assert "KernelAttention" not in str(traced.graph)
    assert "SampleAndWeigh" in str(traced.graph)
    wanted = function(value, locations, weights)
    torch.testing.assert_close(traced(value, locations, weights), wanted)
    compiled = torch.compile(function, backend="eager")
    torch.testing.assert_close(compiled(value, locations, weights), wanted)
    with torch.device("meta"):
        assert function(*(t.to("meta") for t in inputs(torch.float32))).shape == wanted.shape


def test_float32_is_float64_to_rounding() -> None:
    value, locations, weights = inputs()
    exact = deformable_attention(value, SIZES, locations, weights)
    single = deformable_attention(value.float(), SIZES, locations.float(), weights.float())
    # Coordinates up to 5 lose 5 * 2^-24 in a cell; slopes and values are of order 3, and 24 terms
    # of order 1 are summed.
    assert (single - exact).abs().max() < 24 * 3 * 5 * 2**-24 * 3


def test_equals_the_detectors_own_attention() -> None:
    """transformers' Deformable DETR layer, with the same weights."""
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr import modeling_deformable_detr as reference

    config = DeformableDetrConfig(d_model=16, encoder_attention_heads=8, num_feature_levels=2)
    theirs = reference.DeformableDetrMultiscaleDeformableAttention(config, num_heads=8, n_points=4)
    ours = MultiScaleDeformableAttention(16, 2)
    for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        module = getattr(ours, name)
        nn.init.normal_(module.weight, std=0.3)
        getattr(theirs, name).load_state_dict(module.state_dict())
    memory = torch.randn(2, 26, 16)
    position = torch.randn(2, 26, 16)
    centres = cell_centres(SIZES, torch.device("cpu"))
    reference_points = centres[None, :, None].expand(2, -1, 2, -1)
    shapes = torch.tensor(SIZES)
    wanted, _ = theirs(
        hidden_states=memory,
        attention_mask=None,
        encoder_hidden_states=memory,
        position_embeddings=position,
        reference_points=reference_points,
        spatial_shapes=shapes,
        spatial_shapes_list=list(SIZES),
        level_start_index=torch.tensor([0, 20]),
    )
    assert torch.allclose(ours(memory + position, centres, memory, SIZES), wanted, atol=1e-5)


@pytest.mark.parametrize("points", [1, 4, 7, 8, 16])
def test_softmax_of_few_points_is_the_softmax(points: int) -> None:
    logits = torch.randn(2, 5, 3, points, dtype=torch.float64, requires_grad=True)
    above = torch.randn(2, 5, 3, points, dtype=torch.float64)
    results = []
    for softmax in (softmax_over_points, lambda x: x.softmax(-1)):
        found = softmax(logits)
        results.append((found, *torch.autograd.grad(found, logits, above)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)
    assert softmax_over_points(logits[:0]).shape == (0, 5, 3, points)
