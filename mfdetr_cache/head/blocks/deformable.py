"""Multi-scale deformable attention and its layer (Eq. 6), in plain PyTorch.

Shape letters: B batch, N query tokens, S tokens of all levels, D width, H heads, L levels,
P sampling points.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.attention import (
    SizesHw,
    cell_steps,
    deformable_attention,
    softmax_over_points,
)


def num_heads_for(width: int, wanted: int = 8) -> int:
    """The largest number of heads up to ``wanted`` that divides a width.

    Args:
        width: Channels.
        wanted: How many heads the paper has.

    Returns:
        A divisor of ``width``.
    """
    return max(h for h in range(1, wanted + 1) if width % h == 0)


def cell_centres(sizes_hw: SizesHw, device: torch.device) -> Tensor:
    """Normalised centres of all cells of all levels, levels one after the other, row-major.

    Args:
        sizes_hw: Height and width of each level.
        device: Where the result lives.

    Returns:
        x and y in (0, 1), shape (S, 2).
    """
    centres = []
    for height, width in sizes_hw:
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        centres.append(torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1))
    return torch.cat(centres)


class MultiScaleDeformableAttention(nn.Module):
    """Deformable attention with the projections and the initialisation of Deformable DETR.

    Args:
        width: Channels D.
        num_levels: Levels L.
        num_points: Sampling points P per level and head.
    """

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
        """Each head looks in its own direction, point k at distance k cells."""
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

    def forward(self, query: Tensor, centres: Tensor, memory: Tensor, sizes_hw: SizesHw) -> Tensor:
        """Attend from query tokens to all levels.

        Args:
            query: Tokens with their position added, shape (B, N, D).
            centres: Normalised reference point of each query token, shape (N, 2).
            memory: Tokens of all levels, shape (B, S, D).
            sizes_hw: Height and width of each level.

        Returns:
            Shape (B, N, D).
        """
        samples = (self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(memory).unflatten(2, (self.num_heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (*samples, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1))
        weights = softmax_over_points(weights).flatten(-2).unflatten(-1, samples)
        cells = cell_steps(offsets, sizes_hw)[:, None]
        locations = centres[None, :, None, None, None] + offsets * cells
        mixed: Tensor = self.output_proj(deformable_attention(value, sizes_hw, locations, weights))
        return mixed


class DeformableLayer(nn.Module):
    """Post-norm layer: deformable attention, then an FFN four times as wide with GELU.

    Args:
        width: Channels.
        num_levels: Levels.
    """

    def __init__(self, width: int, num_levels: int) -> None:
        super().__init__()
        self.attention = MultiScaleDeformableAttention(width, num_levels)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        centres: Tensor,
        memory: Tensor,
        sizes_hw: SizesHw,
    ) -> Tensor:
        """Refine some tokens of a memory.

        Args:
            tokens: The tokens to refine, shape (B, N, D).
            position: Added to them as attention queries, shape (N, D).
            centres: Their normalised centres, shape (N, 2).
            memory: Tokens of all levels, shape (B, S, D).
            sizes_hw: Height and width of each level.

        Returns:
            Refined tokens, shape (B, N, D).
        """
        attended = self.attention(tokens + position, centres, memory, sizes_hw)
        tokens = self.norm1(tokens + attended)
        hidden = functional.gelu(self.linear1(tokens))
        refined: Tensor = self.norm2(tokens + self.linear2(hidden))
        return refined
