"""The GPU's kernels against plain operators: on a GPU as compiled, elsewhere interpreted."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from mfdetr_cache.ops.deformable_attention import _levels_of, _triton_serves, sampled_attention

pytest.importorskip("triton")

from mfdetr_cache.ops.deformable_attention_triton import TritonAttention
from mfdetr_cache.ops.packed_levels import PackedLevels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = ((5, 7), (1, 2))

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(channels: int, queries: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Locations on, between and far beyond all borders."""
    value = torch.randn(2, 37, 2, channels, dtype=dtype)
    locations = torch.rand(2, queries, 2, 2, 3, 2, dtype=dtype) * 1.8 - 0.4
    locations[0, 0, 0, 0, 0] = torch.tensor([0.5 / 7, 1.5 / 5])
    locations[0, 0, 0, 0, 1] = torch.tensor([0.0, 1.0])
    locations[0, 0, 0, 0, 2] = torch.tensor([float("inf"), -3e9])
    weights = torch.rand(2, queries, 2, 2, 3, dtype=dtype)
    return tuple(t.to(DEVICE).requires_grad_() for t in (value, locations, weights))  # type: ignore[return-value]


def by_kernels(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    batch, queries = locations.shape[:2]
    levels = _levels_of(SIZES, batch, queries, value.device)
    found = TritonAttention.apply(*(t.flatten(0, 1) for t in (value, locations, weights)), levels)
    return found.unflatten(0, (batch, queries))


# One block and several; widths that are a power of two and not, of the paper and of small heads.
@pytest.mark.parametrize(("channels", "queries"), [(12, 5), (32, 21)])
def test_forward_and_backward_are_the_operators(channels: int, queries: int) -> None:
    value, locations, weights = inputs(channels, queries)
    ours = by_kernels(value, locations, weights).flatten(2)
    # grid_sample makes no promise about infinity; far away is as good.
    near = locations.detach().clamp(-9, 9).requires_grad_()
    theirs = sampled_attention(value, SIZES, near, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    above = torch.randn_like(ours)
    for mine, wanted in zip(
        torch.autograd.grad(ours, (value, locations, weights), above),
        torch.autograd.grad(theirs, (value, near, weights), above),
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-11)


def test_images_of_different_sizes_do_not_meet() -> None:
    """Queries of some images, none of one, many of another: each sees its own image alone."""
    sizes = (((5, 7), (1, 2)), ((3, 3), (2, 1)), ((8, 2), (1, 1)))
    counts, tokens = (18, 0, 3), (37, 11, 17)
    value = torch.randn(sum(tokens), 2, 12, dtype=torch.float64, device=DEVICE)
    locations = torch.rand(sum(counts), 2, 2, 3, 2, dtype=torch.float64, device=DEVICE) * 1.8 - 0.4
    weights = torch.rand(sum(counts), 2, 2, 3, dtype=torch.float64, device=DEVICE)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    images = torch.tensor([0] * 18 + [2] * 3, device=DEVICE)
    found = TritonAttention.apply(*inputs, PackedLevels.of(sizes, DEVICE).for_queries(images))
    parts = zip(
        sizes,
        value.split(tokens),
        locations.split(counts),
        weights.split(counts),
        strict=True,
    )
    wanted = torch.cat([sampled_attention(v[None], s, a[None], w[None])[0] for s, v, a, w in parts])
    torch.testing.assert_close(found.flatten(1), wanted, rtol=1e-12, atol=1e-12)
    above = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found.flatten(1), inputs, above),
        torch.autograd.grad(wanted, inputs, above),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_half_precision_values_are_summed_in_float32() -> None:
    value, locations, weights = inputs(16, 5, torch.float32)
    half = value.detach().half().requires_grad_()
    found = by_kernels(half, locations, weights)
    exact = by_kernels(half.float(), locations, weights)
    assert found.dtype == torch.float16
    # Only the result is rounded, to 11 bits.
    torch.testing.assert_close(found.float(), exact, rtol=2**-11, atol=2**-24)
    (grad,) = torch.autograd.grad(found.float().sum(), half)
    assert grad.dtype == torch.float16
    assert grad.isfinite().all()


def test_a_location_that_is_no_number_is_not_overlooked() -> None:
    value, locations, weights = inputs(8, 3, torch.float32)
    with torch.no_grad():
        locations[1, 2, 0, 0, 0, 1] = float("nan")
    found = by_kernels(value, locations, weights)
    assert found[1, 2, 0].isnan().all()
    assert not found[0].isnan().any()


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mfdetr_cache.ops import deformable_attention_triton as module

INTEGERS = {"images": "*i32", "sizes": "*i32", "starts": "*i64", "num_queries": "i32"}
CONSTANTS = dict(heads=8, channels=12, levels=4, points=4, block_n=16, block_c=16)
for values, precise in (("*bf16", "*fp32"), ("*fp64", "*fp64")):
    for kernel in (module._forward, module._backward):
        types = dict.fromkeys(kernel.arg_names, precise) | INTEGERS
        types |= dict.fromkeys(("value", "out", "grad"), values)
        types |= dict.fromkeys(CONSTANTS, "constexpr")
        types = {n: types[n] for n in kernel.arg_names}
        target = GPUTarget("cuda", 80, 32)
        assert triton.compile(ASTSource(kernel, types, CONSTANTS), target=target).asm["cubin"]
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """The interpreter takes more than the compiler does."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_kernels_that_do_not_work_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler, another driver, another GPU: one warning, and the operators' results."""
    device = torch.device(DEVICE.type, 0)
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert _triton_serves.__wrapped__(device)
    assert torch.equal(torch.get_rng_state(), state)

    def no_compiler(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(TritonAttention, "apply", no_compiler)
    with pytest.warns(RuntimeWarning, match=r"RuntimeError: Failed to find C compiler\.\)"):
        assert not _triton_serves.__wrapped__(device)
    monkeypatch.undo()
    backward = TritonAttention.backward

    def wrong_backward(ctx: Any, grad: torch.Tensor) -> Any:
        of_value, of_locations, of_weights, _ = backward(ctx, grad)
        return of_value, of_locations * 1.01, of_weights, None

    monkeypatch.setattr(TritonAttention, "backward", staticmethod(wrong_backward))
    with pytest.warns(RuntimeWarning, match="the gradient of locations is wrong"):
        assert not _triton_serves.__wrapped__(device)
