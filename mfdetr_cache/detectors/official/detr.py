"""Deformable DETR, H-DETR and DINO at test time, with the official parameter names.

Module names are those of the published state dicts, so a checkpoint loads unchanged.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.detectors.official.architecture import OFFICIAL_ARITHMETIC, Architecture
from mfdetr_cache.detectors.official.backbones import Backbone
from mfdetr_cache.detectors.official.positions import (
    box_position,
    inverse_sigmoid,
    map_position,
    valid_ratio,
)
from mfdetr_cache.detectors.official.transformer import (
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Memory,
    Mlp,
    encoder_proposals,
)

WIDTH = 256


@dataclass(frozen=True, slots=True)
class OfficialOutput:
    """Outputs of a detector; B images, Q queries, K labels, S tokens.

    Attributes:
        class_logits: Shape (B, Q, K).
        boxes_cxcywh_norm: Relative to the valid area, shape (B, Q, 4).
        queries: Input of the class head, shape (B, Q, 256).
        references: Reference boxes before the first and after every decoder layer.
        stages: Raw backbone stages at strides 4 to 32.
        projected: Encoder input, shape (B, S, 256).
        encoder_tokens: Output of the requested encoder layers, by number from 1.
        proposal_scores: Scores that rank the proposals, shape (B, S); None in one stage.
        proposal_index: Token of each query by rank, shape (B, Q); None in one stage.
    """

    class_logits: Tensor
    boxes_cxcywh_norm: Tensor
    queries: Tensor
    references: list[Tensor]
    stages: list[Tensor]
    sizes_hw: tuple[tuple[int, int], ...]
    projected: Tensor
    encoder_tokens: dict[int, Tensor]
    proposal_scores: Tensor | None
    proposal_index: Tensor | None


@dataclass(frozen=True, slots=True)
class _Start:
    queries: Tensor
    reference: Tensor
    position: Tensor | None
    scores: Tensor | None = None
    index: Tensor | None = None


class _Decoder(nn.Module):
    """Holds what the state dict has below ``transformer.decoder``."""

    def __init__(self, layers: list[DecoderLayer], architecture: Architecture) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if architecture.scheme == "dino":
            self.norm = nn.LayerNorm(WIDTH)
            self.ref_point_head = Mlp(2 * WIDTH, WIDTH, WIDTH)


class _Transformer(nn.Module):
    """Holds what the state dict has below ``transformer``."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        shape = (WIDTH, architecture.hidden, architecture.num_levels, architecture.num_points)
        self.encoder = Encoder([EncoderLayer(*shape) for _ in range(architecture.encoder_layers)])
        decoder = [DecoderLayer(*shape) for _ in range(architecture.decoder_layers)]
        self.decoder = _Decoder(decoder, architecture)
        self.level_embed = nn.Parameter(torch.randn(architecture.num_levels, WIDTH))
        if architecture.two_stage:
            self.enc_output = nn.Linear(WIDTH, WIDTH)
            self.enc_output_norm = nn.LayerNorm(WIDTH)
        if architecture.scheme == "dino":
            self.tgt_embed = nn.Embedding(architecture.table_rows, WIDTH)
            if architecture.shares_heads:
                self.enc_out_bbox_embed = Mlp(WIDTH, WIDTH, WIDTH, 4)
                self.enc_out_class_embed = nn.Linear(WIDTH, architecture.num_labels)
        elif architecture.two_stage:
            self.pos_trans = nn.Linear(2 * WIDTH, 2 * WIDTH)
            self.pos_trans_norm = nn.LayerNorm(2 * WIDTH)
        else:
            self.reference_points = nn.Linear(WIDTH, 2)


class OfficialDetr(nn.Module):
    """A frozen detector of the paper."""

    transformer: Any
    backbone: Any

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        a = architecture
        self.arithmetic = a.arithmetic or OFFICIAL_ARITHMETIC[a.scheme]
        self.num_queries = a.num_queries
        # DINO's Swin and FocalNet have no "body" in their keys, H-DETR's Swin and ResNets have.
        self.bare_backbone = a.shares_heads and a.backbone.kind != "resnet"
        self._backbone = [Backbone(a.backbone)]
        holder = self._backbone[0].body if self.bare_backbone else self._backbone[0]
        self.backbone = nn.ModuleList([holder])
        channels = a.backbone.stage_channels[a.backbone.first_stage :]
        bias = a.layout != "mmdetection"
        projections = [nn.Conv2d(c, WIDTH, 1, bias=bias) for c in channels]
        width = channels[-1]
        for _ in range(a.num_levels - len(channels)):
            projections.append(nn.Conv2d(width, WIDTH, 3, 2, 1, bias=bias))
            width = WIDTH
        self.input_proj = nn.ModuleList(
            nn.Sequential(conv, nn.GroupNorm(32, WIDTH)) for conv in projections
        )
        self.transformer = _Transformer(a)
        if a.shares_heads:
            self.label_enc = nn.Embedding(a.num_labels + 1, WIDTH)  # denoising, training only
        elif a.scheme == "h-detr":
            self.query_embed = nn.Embedding(a.table_rows, WIDTH)
        elif not a.two_stage:
            self.query_embed = nn.Embedding(a.table_rows or a.num_queries, 2 * WIDTH)
        self._add_heads()

    def _add_heads(self) -> None:
        a = self.architecture
        label, box = nn.Linear(WIDTH, a.num_labels), Mlp(WIDTH, WIDTH, WIDTH, 4)
        own = a.box_refine and not a.shares_heads
        count = a.decoder_layers + (a.two_stage and not a.shares_heads)

        def heads(head: nn.Module) -> nn.ModuleList:
            return nn.ModuleList(copy.deepcopy(head) if own else head for _ in range(count))

        self.class_embed, self.bbox_embed = heads(label), heads(box)
        if a.layout == "mmdetection":
            return
        # The other state dicts list the same heads again below the decoder.
        if a.box_refine:
            self.transformer.decoder.bbox_embed = self.bbox_embed
        if a.two_stage:
            self.transformer.decoder.class_embed = self.class_embed

    def forward(
        self,
        pixel_values: Tensor,
        padding_mask: Tensor | None = None,
        keep_layers: tuple[int, ...] = (),
    ) -> OfficialOutput:
        """Run the detector on normalised images (B, 3, H, W), zero where padded.

        ``padding_mask`` (B, H, W) is True where a pixel is padding; ``keep_layers`` numbers the
        encoder layers to return from 1.
        """
        if padding_mask is None:
            padding_mask = torch.zeros_like(pixel_values[:, 0], dtype=torch.bool)
        stages, outputs = self._backbone[0](pixel_values)
        memory, position = self._levels(outputs, padding_mask)
        projected = memory.tokens
        memory, kept = self.transformer.encoder(memory, position, keep_layers)
        start = self._start(memory)
        queries, references, logits, boxes = self._decode(start, memory)
        return OfficialOutput(
            class_logits=logits,
            boxes_cxcywh_norm=boxes,
            queries=queries,
            references=references,
            stages=stages,
            sizes_hw=memory.sizes_hw,
            projected=projected,
            encoder_tokens=kept,
            proposal_scores=start.scores,
            proposal_index=start.index,
        )

    def _levels(self, outputs: list[Tensor], padding_mask: Tensor) -> tuple[Memory, Tensor]:
        """Projected levels with masks, and position plus level embedding."""
        temperature, offset = self.arithmetic.temperature, self.arithmetic.offset
        maps = [p(o) for p, o in zip(self.input_proj, outputs, strict=False)]
        source = outputs[-1]
        for extra in self.input_proj[len(outputs) :]:
            source = extra(source)
            maps.append(source)
        masks = [
            functional.interpolate(padding_mask[:, None].float(), size=m.shape[-2:])[:, 0] > 0.5
            for m in maps
        ]
        like = maps[0]
        position = torch.cat(
            [
                map_position(mask, temperature, offset, like) + self.transformer.level_embed[level]
                for level, mask in enumerate(masks)
            ],
            dim=1,
        )
        memory = Memory(
            torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1),
            tuple((int(m.shape[-2]), int(m.shape[-1])) for m in maps),
            torch.cat([m.flatten(1) for m in masks], dim=1),
            torch.stack([valid_ratio(m, like) for m in masks], dim=1),
        )
        return memory, position

    def _start(self, memory: Memory) -> _Start:
        """Queries, their positions and their first reference boxes."""
        batch, a, t = memory.tokens.shape[0], self.architecture, self.transformer
        if not a.two_stage:
            position, queries = self.query_embed.weight[: self.num_queries].split(WIDTH, dim=1)
            position = position.expand(batch, -1, -1)
            reference = t.reference_points(position).sigmoid()
            return _Start(queries.expand(batch, -1, -1), reference, position)

        def project(tokens: Tensor) -> Tensor:
            projected: Tensor = t.enc_output_norm(t.enc_output(tokens))
            return projected

        features, proposals = encoder_proposals(memory, project)
        label, box = self.class_embed[-1], self.bbox_embed[-1]
        if a.shares_heads:
            label, box = t.enc_out_class_embed, t.enc_out_bbox_embed
        scores = label(features)
        scores = scores.max(-1).values if a.scheme == "dino" else scores[..., 0]
        logits = box(features) + proposals
        index = scores.topk(self.num_queries, dim=1).indices
        # ONNX has no take_along_dim.
        reference = logits.gather(1, index[..., None].expand(-1, -1, 4)).sigmoid()
        if a.scheme == "dino":
            table = t.tgt_embed.weight[: self.num_queries]
            return _Start(table.expand(batch, -1, -1), reference, None, scores, index)
        both = t.pos_trans_norm(t.pos_trans(box_position(reference, (0, 1, 2, 3))))
        position, queries = both.split(WIDTH, dim=2)
        if a.scheme == "h-detr":
            # Mixed selection: learned content, by rank, at the position of the proposal.
            queries = self.query_embed.weight[: self.num_queries].expand(batch, -1, -1)
        return _Start(queries, reference, position, scores, index)

    def _decode(self, start: _Start, memory: Memory) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """All decoder layers; the last one's queries give classes and boxes."""
        dino = self.architecture.scheme == "dino"
        queries, reference = start.queries, start.reference
        references = [reference]
        before = reference
        decoder = self.transformer.decoder
        for number, layer in enumerate(decoder.layers):
            ratios = memory.valid_ratios[:, None]
            scaled = reference[:, :, None] * ratios.repeat(1, 1, 1, reference.shape[-1] // 2)
            position = start.position
            if dino:
                position = decoder.ref_point_head(box_position(scaled[:, :, 0], (1, 0, 2, 3)))
            queries = layer(queries, position, scaled, memory)
            before = reference
            if self.architecture.box_refine:
                reference = self._boxes(number, queries, reference, self.arithmetic.update_eps)
            references.append(reference)
        queries = decoder.norm(queries) if dino else queries
        last = len(decoder.layers) - 1
        logits = self.class_embed[last](queries)
        boxes = self._boxes(last, queries, before, self.arithmetic.final_eps)
        return queries, references, logits, boxes

    def _boxes(self, layer: int, queries: Tensor, reference: Tensor, eps: float) -> Tensor:
        """Boxes relative to a reference, which may be a point."""
        delta = self.bbox_embed[layer](queries)
        base = inverse_sigmoid(reference, eps)
        if base.shape[-1] == 2:
            base = functional.pad(base, (0, 2))
        boxes: Tensor = (delta + base).sigmoid()
        return boxes
