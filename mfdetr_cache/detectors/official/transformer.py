"""Encoder and decoder layers shared by Deformable DETR, H-DETR and DINO (post-norm, ReLU)."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfdetr_cache.ops.deformable_attention import cell_steps, deformable_attention
from mfdetr_cache.ops.packed_levels import SizesHw

HEADS = 8


@dataclass(frozen=True, slots=True)
class Memory:
    """The flattened levels of a batch.

    Attributes:
        tokens: Levels one after the other, row-major, shape (B, S, C).
        padding_mask: True where a token is padding, shape (B, S).
        valid_ratios: Valid share of each level along x and y, shape (B, L, 2).
    """

    tokens: Tensor
    sizes_hw: SizesHw
    padding_mask: Tensor
    valid_ratios: Tensor


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with the published parameter names."""

    def __init__(self, width: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.samples = (HEADS, num_levels, num_points)
        self.sampling_offsets = nn.Linear(width, HEADS * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(width, HEADS * num_levels * num_points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Attend to all levels: (B, N, C) from a query (B, N, C) with its position added.

        ``reference`` are points (x, y) or boxes (cx, cy, w, h) on each level, already scaled by the
        valid ratios, shape (B, N, L, 2 or 4).
        """
        value = self.value_proj(memory.tokens)
        value = value.masked_fill(memory.padding_mask[..., None], 0.0)
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.samples, 2))
        weights = self.attention_weights(query).unflatten(-1, (HEADS, -1)).softmax(-1)
        if reference.shape[-1] == 2:
            scale = cell_steps(offsets, memory.sizes_hw)
            locations = reference[:, :, None, :, None] + offsets * scale[:, None]
        else:
            extent = reference[:, :, None, :, None, 2:] * (0.5 / self.samples[2])
            locations = reference[:, :, None, :, None, :2] + offsets * extent
        mixed: Tensor = self.output_proj(
            deformable_attention(
                value.unflatten(-1, (HEADS, -1)),
                memory.sizes_hw,
                locations,
                weights.unflatten(-1, self.samples[1:]),
            )
        )
        return mixed


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then an FFN of ``hidden`` channels."""

    def __init__(self, width: int, hidden: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(width, num_levels, num_points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, memory: Memory, position: Tensor, reference: Tensor) -> Tensor:
        """New tokens (B, S, C); the position (B, S, C) is added to the query only."""
        tokens = memory.tokens
        tokens = self.norm1(tokens + self.self_attn(tokens + position, reference, memory))
        refined: Tensor = self.norm2(tokens + self.linear2(self.linear1(tokens).relu()))
        return refined


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the memory, an FFN."""

    def __init__(self, width: int, hidden: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(width, num_levels, num_points)
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self, queries: Tensor, position: Tensor, reference: Tensor, memory: Memory
    ) -> Tensor:
        """New queries (B, Q, C); position (B, Q, C), reference (B, Q, L, 2 or 4)."""
        placed = queries + position
        mixed = self.self_attn(placed, placed, queries, need_weights=False)[0]
        queries = self.norm2(queries + mixed)
        queries = self.norm1(queries + self.cross_attn(queries + position, reference, memory))
        refined: Tensor = self.norm3(queries + self.linear2(self.linear1(queries).relu()))
        return refined


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, memory: Memory, position: Tensor, keep: tuple[int, ...]
    ) -> tuple[Memory, dict[int, Tensor]]:
        """The memory after the last layer, and the tokens after each layer in ``keep``, from 1.

        ``position``, shape (B, S, C), includes the level embedding.
        """
        reference = encoder_references(memory)
        kept: dict[int, Tensor] = {}
        for number, layer in enumerate(self.layers, 1):
            tokens = layer(memory, position, reference)
            memory = Memory(tokens, memory.sizes_hw, memory.padding_mask, memory.valid_ratios)
            if number in keep:
                kept[number] = tokens
        return memory, kept


def _cell_centres(size_hw: tuple[int, int], like: Tensor) -> Tensor:
    """X and y of the centres of all cells, in cells, shape (1, h * w, 2)."""
    y, x = (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5 for n in size_hw)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), -1).flatten(0, 1)[None]


def _valid_cells(ratios: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Cells along x and y that are not padding, shape (B, 1, 2), from shares (B, 2)."""
    # Not a tensor of both sizes: a GPU would be waited for while it is copied.
    height, width = size_hw
    return torch.stack((ratios[:, 0] * width, ratios[:, 1] * height), dim=-1)[:, None]


def encoder_references(memory: Memory) -> Tensor:
    """Cell centres x, y relative to valid area, times each level's valid ratio, (B, S, L, 2)."""
    ratios, points = memory.valid_ratios, []
    for level, (height, width) in enumerate(memory.sizes_hw):
        cells = _cell_centres((height, width), ratios)
        points.append(cells / _valid_cells(ratios[:, level], (height, width)))
    return torch.cat(points, dim=1)[:, :, None] * ratios[:, None]


def encoder_proposals(memory: Memory, project: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A box for every token: its cell's centre, 0.05 * 2^level wide and high.

    ``project`` gives the features that score the proposals. Returns these, shape (B, S, C), of zero
    tokens where a token is padding or its box leaves the image; and box logits, shape (B, S, 4),
    infinite there.
    """
    parts, ratios = [], memory.valid_ratios
    for level, (height, width) in enumerate(memory.sizes_hw):
        cells = _cell_centres((height, width), ratios)
        # Counted cells, as the official code has them: ratios times sizes are whole numbers.
        centre = cells / _valid_cells(ratios[:, level], (height, width)).round()
        parts.append(torch.cat((centre, torch.full_like(centre, 0.05 * 2**level)), dim=-1))
    boxes = torch.cat(parts, dim=1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    usable = usable & ~memory.padding_mask[..., None]
    logits = torch.log(boxes / (1 - boxes)).masked_fill(~usable, torch.inf)
    return project(memory.tokens.masked_fill(~usable, 0.0)), logits


class Mlp(nn.Module):
    """Linear layers with ReLU in between, of the given input and output widths."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))

    def forward(self, values: Tensor) -> Tensor:
        """Shape (..., widths[0]) to (..., widths[-1])."""
        for layer in self.layers[:-1]:
            values = layer(values).relu()
        result: Tensor = self.layers[-1](values)
        return result
