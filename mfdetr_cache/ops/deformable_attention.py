"""Multi-scale deformable attention, the core without projections.

In plain PyTorch everywhere, and by compiled kernels on a CPU (numba) and a GPU (Triton). It serves
the mask network and the detectors' own layers; the official goldens of H-DETR, Deformable DETR and
DINO go through it.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mfdetr_cache.ops.devices import is_plain, kept
from mfdetr_cache.ops.packed_levels import PackedLevels, SizesHw

# From about here on torch's own softmax over the last axis is the faster one (16: three times).
_SHORT_ROW = 8


class _SampleAndWeigh(torch.autograd.Function):
    """Bilinear samples of one level, weighted and summed, without keeping the samples.

    Autograd would keep every sample of every head for the backward pass, by far the largest
    tensors of the network. Sampling again costs less than moving them through memory.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, grid: Tensor, weights: Tensor) -> Tensor:  # noqa: ANN401
        """Sum over P of weight times sample: (M, C, h, w), (M, P, N, 2), (M, P, N) to (M, C, N).

        ``grid`` holds sampling points in [-1, 1].
        """
        ctx.save_for_backward(maps, grid, weights)
        samples = functional.grid_sample(maps, grid, mode="bilinear", align_corners=False)
        return samples.mul_(weights[:, None]).sum(dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        """Gradients of maps, grid and weights from one of shape (M, C, N)."""
        maps, grid, weights = ctx.saved_tensors
        spread = grad[:, :, None] * weights[:, None]
        grad_maps, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            spread, maps, grid, 0, 0, False, [True, True]
        )
        samples = functional.grid_sample(maps, grid, mode="bilinear", align_corners=False)
        grad_weights = samples.mul_(grad[:, :, None]).sum(dim=1)
        return grad_maps, grad_grid, grad_weights


def softmax_over_points(logits: Tensor) -> Tensor:
    """Softmax over the last axis, (..., L P) to the same shape."""
    # torch takes rows of four one by one: the other way around it is five times as fast.
    if logits.device.type == "cpu" and logits.shape[-1] < _SHORT_ROW and is_plain(logits):
        columns = logits.flatten(0, -2).t().contiguous()
        return columns.softmax(0).t().reshape(logits.shape)
    return logits.softmax(-1)


def cell_steps(offsets: Tensor, sizes_hw: SizesHw) -> Tensor:
    """Normalised cell width and height, 1 / w and 1 / h, of each level, shape (L, 2).

    Device and dtype are those of ``offsets``.
    """
    return _cell_steps(sizes_hw, offsets.device, offsets.dtype)


@kept(1024)
def _cell_steps(sizes_hw: SizesHw, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor([[1 / w, 1 / h] for h, w in sizes_hw], dtype=dtype, device=device)


def deformable_attention(
    value: Tensor, sizes_hw: SizesHw, locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples (Zhu et al., 2021, Eq. 3). Outside a map values are zero.

    Args:
        value: Projected values, shape (B, S, H, D / H).
        sizes_hw: Height and width of each level; their areas sum to S.
        locations: Sampling points in normalised coordinates, shape (B, N, H, L, P, 2).
        weights: Attention weights, summing to one over L and P, shape (B, N, H, L, P).

    Returns:
        Shape (B, N, D).
    """
    if value.device.type == "meta":
        # Shapes alone, for counting a head; sampling step by step would take most of its time.
        return value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
    if (attention := _kernels_for(value)) is None:
        return sampled_attention(value, sizes_hw, locations, weights)
    batch, queries = locations.shape[:2]
    levels = _levels_of(sizes_hw, batch, queries, value.device)
    attended = attention(
        value.flatten(0, 1), locations.flatten(0, 1), weights.flatten(0, 1), levels
    )
    mixed: Tensor = attended.unflatten(0, (batch, queries)).flatten(2)
    return mixed


def packed_attention(
    value: Tensor, levels: PackedLevels, locations: Tensor, weights: Tensor
) -> Tensor:
    """:func:`deformable_attention` over images of different sizes at once.

    Args:
        value: Projected values of all images, shape (S, H, D / H).
        levels: Layout of the tokens.
        locations: Sampling points in coordinates of the query's image, shape (N, H, L, P, 2).
        weights: Attention weights, shape (N, H, L, P).

    Returns:
        Shape (N, D).
    """
    if (attention := _kernels_for(value)) is not None:
        return attention(value, locations, weights, levels).flatten(1)
    parts = []
    ends = [*levels.starts[1:, 0].tolist(), len(value)]
    sizes = [tuple(map(tuple, image)) for image in levels.sizes.tolist()]
    for image, (sizes_hw, end) in enumerate(zip(sizes, ends, strict=True)):
        one = value[None, end - sum(h * w for h, w in sizes_hw) : end]
        mine = (levels.images == image).nonzero()[:, 0]
        parts.append(sampled_attention(one, sizes_hw, locations[None, mine], weights[None, mine]))
    return torch.cat(parts, dim=1)[0]


_Attention = Callable[[Tensor, Tensor, Tensor, PackedLevels], Tensor]


def _kernels_for(value: Tensor) -> _Attention | None:
    """Kernels that serve where these values are; None where operators must do."""
    if not is_plain(value):
        return None
    # Coordinates do not survive 8 bits of mantissa: sampling is done in float32 at least.
    precise = torch.promote_types(value.dtype, torch.float32)
    if value.device.type == "cpu":
        # numba takes half a second to import; a GPU never needs it.
        from mfdetr_cache.ops.deformable_attention_numba import KernelAttention

        def on_cpu(value: Tensor, *places: Any) -> Tensor:  # noqa: ANN401
            inputs = [t.to(precise) for t in (value, *places[:2])]
            attended: Tensor = KernelAttention.apply(*inputs, places[2])
            return attended.to(value.dtype)

        return on_cpu
    if value.device.type == "cuda" and _triton_serves(value.device):
        from mfdetr_cache.ops.deformable_attention_triton import TritonAttention

        def on_gpu(value: Tensor, *places: Any) -> Tensor:  # noqa: ANN401
            precise_places = [t.to(precise) for t in places[:2]]
            attended: Tensor = TritonAttention.apply(value, *precise_places, places[2])
            return attended

        return on_gpu
    return None


@kept(64)
def _levels_of(sizes_hw: SizesHw, batch: int, queries: int, device: torch.device) -> PackedLevels:
    """Images of one size, so many queries in each."""
    one = PackedLevels.of([sizes_hw], device)
    number = torch.arange(batch, device=device)
    tokens = sum(h * w for h, w in sizes_hw)
    return PackedLevels(
        one.sizes.expand(batch, -1, -1).contiguous(),
        one.starts + tokens * number[:, None],
        torch.arange(batch * queries, dtype=torch.int32, device=device) // max(queries, 1),
    )


@cache
def _triton_serves(device: torch.device) -> bool:
    """Whether the kernels give what the operators give on this very device; asked once."""
    # It comes with torch where torch comes with CUDA, on Linux.
    if find_spec("triton") is None:
        return False
    try:
        from mfdetr_cache.ops.deformable_attention_triton import TritonAttention

        fault = _fault_of(TritonAttention.apply, device)
    except Exception as error:  # a compiler is missing, a driver is too old, ...
        fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if fault:
        warnings.warn(
            f"deformable attention goes by torch's operators on {device}, which is slower: "
            f"its Triton kernels do not work here ({fault})",
            RuntimeWarning,
            stacklevel=2,
        )
    return not fault


def _fault_of(attention: Callable[..., Tensor], device: torch.device) -> str:
    """Where a kernel differs from the operators on a small example; empty if nowhere."""
    sizes_hw = ((3, 5), (2, 2))
    # No random numbers: a training that goes on must draw the same ones.
    shapes = ((1, 19, 2, 16), (1, 20, 2, 2, 3, 2), (1, 20, 2, 2, 3))
    levels = _levels_of(sizes_hw, 1, 20, device)
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        inputs = [
            (0.5 + 0.7 * torch.arange(math.prod(s), device=device).mul(0.37).sin())
            .reshape(s)
            .requires_grad_()
            for s in shapes
        ]
        ours = attention(*(t[0] for t in inputs), levels).flatten(1)[None]
        theirs = sampled_attention(inputs[0], sizes_hw, *inputs[1:])
        above = theirs.detach().cos()
        pairs = zip(
            (ours, *torch.autograd.grad(ours, inputs, above)),
            (theirs, *torch.autograd.grad(theirs, inputs, above)),
            ("result", "gradient of value", "gradient of locations", "gradient of weights"),
            strict=True,
        )
        # Sums of some ten products in float32.
        for mine, wanted, name in pairs:
            if not (mine - wanted).norm() <= 1e-4 * wanted.norm():
                return f"the {name} is wrong"
    return ""


def sampled_attention(
    value: Tensor, sizes_hw: SizesHw, locations: Tensor, weights: Tensor
) -> Tensor:
    """:func:`deformable_attention` in plain PyTorch, for any device and for export."""
    # Sizes of batch and queries are never named, so that an exported graph takes any of them.
    heads = value.shape[2]
    # Points before queries: the innermost axis is then long, and sums over points run along it.
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # (L, B*H, P, N, 2)
    shares = weights.permute(3, 0, 2, 4, 1).flatten(1, 2)  # (L, B*H, P, N)
    mixed: Tensor | None = None
    parts = value.split([h * w for h, w in sizes_hw], dim=1)
    for level, (part, size_hw) in enumerate(zip(parts, sizes_hw, strict=True)):
        maps = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, size_hw)
        # Coordinates do not survive 8 bits of mantissa: sampling is done in float32 at least.
        precise = torch.promote_types(maps.dtype, torch.float32)
        of_level: Tensor = _SampleAndWeigh.apply(
            maps.to(precise),
            grids[level].to(precise).contiguous(),
            shares[level].to(precise).contiguous(),
        )
        mixed = of_level if mixed is None else mixed + of_level
    assert mixed is not None
    joined: Tensor = mixed.unflatten(0, (-1, heads)).flatten(1, 2)
    return joined.transpose(1, 2).to(value.dtype)
