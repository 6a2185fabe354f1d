"""Multi-scale deformable attention and its layer (Eq. 6), in plain PyTorch, with or without it.

Shape letters: B batch, N query tokens, S tokens of all levels, D width, H heads, L levels,
P sampling points. A batch is of images of one size, (B, N, D), or of any sizes, packed into one
sequence without the leading axis: (N, D).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.ops.deformable_attention import (
    cell_steps,
    deformable_attention,
    packed_attention,
    softmax_over_points,
)
from mfdetr_cache.ops.devices import kept
from mfdetr_cache.ops.packed_levels import PackedLevels, SizesHw


def num_heads_for(width: int) -> int:
    """The largest number of heads up to 8, the paper's, that divides a width."""
    return max(h for h in range(1, 9) if width % h == 0)


@kept(256)
def cell_centres(sizes_hw: SizesHw, device: torch.device, shift: float = 0.0) -> Tensor:
    """Normalised x and y in (0, 1) of all cells, level by level and row-major, shape (S, 2).

    ``shift`` is added along both axes, in cells.
    """
    centres = []
    for height, width in sizes_hw:
        y = (torch.arange(height, device=device) + (0.5 + shift)) / height
        x = (torch.arange(width, device=device) + (0.5 + shift)) / width
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centres.append(torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1))
    return torch.cat(centres)


class MultiScaleDeformableAttention(nn.Module):
    """Deformable attention with the projections and the initialisation of Deformable DETR."""

    def __init__(self, width: int, num_levels: int, num_points: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads_for(width)
        self.num_levels = num_levels
        self.num_points = num_points
        samples = self.num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(width, samples * 2)
        self.attention_weights = nn.Linear(width, samples)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._initialise()

    def _initialise(self) -> None:
        """Each head samples in its own direction, point k at a distance of k cells."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().max(dim=-1, keepdim=True).values
        offsets = directions[:, None, None].repeat(1, self.num_levels, self.num_points, 1)
        offsets = offsets * torch.arange(1, self.num_points + 1)[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.data.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, centres: Tensor, memory: Tensor, levels: SizesHw | PackedLevels
    ) -> Tensor:
        """Attend from query tokens to all levels.

        Args:
            query: Tokens with their position added, shape (B, N, D) or (N, D).
            centres: Normalised reference point of each query token, shape (N, 2).
            memory: Tokens of all levels, shape (B, S, D) or (S, D).
            levels: Height and width of each level, or the layout of packed tokens.

        Returns:
            Shape of the query.
        """
        samples = (self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(memory).unflatten(-1, (self.num_heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (*samples, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1))
        weights = softmax_over_points(weights).flatten(-2).unflatten(-1, samples)
        reference = centres[:, None, None, None]
        if isinstance(levels, PackedLevels):
            locations = reference + offsets * levels.cell_steps(offsets)[:, None, :, None]
            sampled = packed_attention(value, levels, locations, weights)
        else:
            locations = reference + offsets * cell_steps(offsets, levels)[:, None]
            sampled = deformable_attention(value, levels, locations, weights)
        mixed: Tensor = self.output_proj(sampled)
        return mixed


def _feed_forward(width: int) -> tuple[nn.Linear, nn.Linear]:
    linears = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    for linear in linears:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linears


class DeformableLayer(nn.Module):
    """Post-norm layer: deformable attention, then an FFN four times as wide with GELU."""

    def __init__(self, width: int, num_levels: int) -> None:
        super().__init__()
        self.attention = MultiScaleDeformableAttention(width, num_levels)
        self.norm1 = nn.LayerNorm(width)
        self.linear1, self.linear2 = _feed_forward(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        centres: Tensor,
        memory: Tensor,
        levels: SizesHw | PackedLevels,
    ) -> Tensor:
        """Refine some tokens of a memory.

        Args:
            tokens: The tokens to refine, shape (B, N, D) or (N, D).
            position: Added to them as attention queries, shape (N, D).
            centres: Their normalised centres, shape (N, 2).
            memory: Tokens of all levels, shape (B, S, D) or (S, D).
            levels: Height and width of each level, or the layout of packed tokens.

        Returns:
            Refined tokens, shape of ``tokens``.
        """
        attended = self.attention(tokens + position, centres, memory, levels)
        tokens = self.norm1(tokens + attended)
        hidden = functional.gelu(self.linear1(tokens))
        refined: Tensor = self.norm2(tokens + self.linear2(hidden))
        return refined


class FfnBlock(nn.Module):
    """FFN four times as wide with GELU, residual and norm, over channels-last maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = _feed_forward(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Refine maps of shape (B, h, w, D), each cell by itself."""
        refined: Tensor = self.norm(maps + self.linear2(functional.gelu(self.linear1(maps))))
        return refined
