"""The architecture of an official checkpoint, by name or inferred from tensor shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mfdetr_cache.detectors.names import count
from mfdetr_cache.detectors.official.backbones import BackboneArchitecture
from mfdetr_cache.errors import DetectorError

Scheme = Literal["deformable-detr", "h-detr", "dino"]
Layout = Literal["official", "detrex", "mmdetection"]

# One-to-many queries of every published H-DETR; the rest of its query table is one-to-one.
_ONE_TO_MANY = 1500


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What a detector computes without a tensor that says it.

    Attributes:
        temperature: Temperature of the encoder's position encoding.
        offset: Cells that are subtracted from a position before it is encoded.
        update_eps: Where the inverse sigmoid is cut that updates boxes between decoder layers.
        final_eps: Where that of the boxes of the output is cut.
    """

    temperature: float
    offset: float
    update_eps: float
    final_eps: float


OFFICIAL_ARITHMETIC: dict[Scheme, Arithmetic] = {
    "deformable-detr": Arithmetic(10000.0, 0.5, 1e-5, 1e-5),
    "h-detr": Arithmetic(10000.0, 0.5, 1e-5, 1e-5),
    "dino": Arithmetic(20.0, 0.0, 1e-3, 1e-3),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """Hyperparameters of an official detector, or of the same one in another code base.

    Attributes:
        scheme: Detector, which decides how proposals, queries and boxes are computed.
        num_points: Sampling points of deformable attention.
        num_queries: Queries at test time.
        table_rows: Rows of the query table in the checkpoint (H-DETR: one-to-many ones too); 0
            where there is none.
        hidden: Channels inside the FFNs.
        layout: Whose checkpoint this is: some tensors are there in one code base only.
        arithmetic: What its code computes; None for that of the official code.
    """

    scheme: Scheme
    backbone: BackboneArchitecture
    num_levels: int = 4
    num_points: int = 4
    num_labels: int = 91
    num_queries: int = 300
    table_rows: int = 0
    hidden: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    two_stage: bool = True
    box_refine: bool = True
    layout: Layout = "official"
    arithmetic: Arithmetic | None = None

    @property
    def shares_heads(self) -> bool:
        """Whether all decoder layers have one head, and proposals another (DINO's own code)."""
        return self.scheme == "dino" and self.layout == "official"


_R50 = BackboneArchitecture("resnet", (3, 4, 6, 3), 256)
_SWIN_T = BackboneArchitecture("swin", (2, 2, 6, 2), 96, (3, 6, 12, 24), 7)
_SWIN_L7 = BackboneArchitecture("swin", (2, 2, 18, 2), 192, (6, 12, 24, 48), 7)
_SWIN_L12 = BackboneArchitecture("swin", (2, 2, 18, 2), 192, (6, 12, 24, 48), 12)
_FOCAL_L = BackboneArchitecture(
    "focalnet", (2, 2, 18, 2), 192, kernels=(3, 5, 7, 9), first_stage=0, divides=True
)

# Name to its default; a checkpoint's shapes decide queries, levels, widths and depths.
ARCHITECTURES: dict[str, Architecture] = {
    "h-detr-r50": Architecture("h-detr", _R50, table_rows=1800),
    "h-detr-swin-t": Architecture("h-detr", _SWIN_T, table_rows=1800),
    "h-detr-swin-l": Architecture("h-detr", _SWIN_L7, num_queries=900, table_rows=2400),
    "dino-r50": Architecture("dino", _R50, num_queries=900, table_rows=900),
    "dino-swin-l": Architecture("dino", _SWIN_L12, num_queries=900, table_rows=900),
    "dino-focalnet-l": Architecture(
        "dino", _FOCAL_L, num_levels=5, num_queries=900, table_rows=900
    ),
    "deformable-detr-r50": Architecture("deformable-detr", _R50, hidden=1024),
}


def read_architecture(
    weights: Mapping[str, Tensor],
    where: str,
    layout: Layout = "official",
    arithmetic: Arithmetic | None = None,
    *,
    by_channel: bool = False,
) -> Architecture:
    """Infer the architecture from a state dict; DetectorError if it is no known detector.

    Its names are the official ones, whatever the ``layout`` of the file. A Swin may merge its
    patches ``by_channel``.
    """
    try:
        encoder = "transformer.encoder.layers.0"
        num_levels = weights["transformer.level_embed"].shape[0]
        samples = weights[f"{encoder}.self_attn.attention_weights.bias"].shape[0]
        two_stage = "transformer.enc_output.weight" in weights
        scheme: Scheme = "deformable-detr"
        table = weights.get("query_embed.weight")
        if "transformer.tgt_embed.weight" in weights:
            scheme, table = "dino", weights["transformer.tgt_embed.weight"]
        elif table is not None and two_stage:
            scheme = "h-detr"
        rows = queries = 0 if table is None else table.shape[0]
        # Fewer rows than the one-to-many group: a table that was cut to the one-to-one queries.
        if scheme != "dino" and rows > _ONE_TO_MANY:
            queries = rows - _ONE_TO_MANY
        backbone = read_backbone(weights)
        backbone = replace(
            backbone,
            by_channel=by_channel,
            # The official FocalNet-DINO with four focal levels divides, and no other.
            divides=layout == "official" and len(backbone.kernels) == 4,
        )
        return Architecture(
            scheme=scheme,
            backbone=backbone,
            num_levels=num_levels,
            num_points=samples // (8 * num_levels),
            num_labels=weights["class_embed.0.bias"].shape[0],
            num_queries=queries or 300,
            table_rows=rows,
            hidden=weights[f"{encoder}.linear1.bias"].shape[0],
            encoder_layers=count(weights, r"transformer\.encoder\.layers\.(\d+)\."),
            decoder_layers=count(weights, r"transformer\.decoder\.layers\.(\d+)\."),
            two_stage=two_stage,
            box_refine=_refines(weights, layout),
            layout=layout,
            arithmetic=arithmetic,
        )
    except KeyError as error:
        written = "in the official layout" if layout == "official" else f"as {layout} writes it"
        raise DetectorError(
            f"{where} is no checkpoint of Deformable DETR, H-DETR or DINO with a ResNet, Swin, "
            f"FocalNet or ConvNeXt {written}: it has no {error.args[0]}"
        ) from None


def _refines(weights: Mapping[str, Tensor], layout: Layout) -> bool:
    """Whether layers have box heads of their own; mmdetection lists a shared one for each."""
    if layout != "mmdetection":
        return "transformer.decoder.bbox_embed.0.layers.0.weight" in weights
    first, second = (weights.get(f"bbox_embed.{i}.layers.0.weight") for i in (0, 1))
    return first is None or second is None or not torch.equal(first, second)


def read_backbone(weights: Mapping[str, Tensor]) -> BackboneArchitecture:
    """Infer the backbone from a state dict; KeyError if it is none of those known."""
    body = "backbone.0.body." if any(k.startswith("backbone.0.body.") for k in weights) else ""
    body = body or "backbone.0."
    plain = re.escape(body)
    first_width = weights["input_proj.0.0.weight"].shape[1]
    if f"{body}layer1.0.conv1.weight" in weights:
        depths = tuple(count(weights, rf"{plain}layer{i}\.(\d+)\.") for i in range(1, 5))
        width = weights[f"{body}layer1.0.conv3.weight"].shape[0]
        first_stage = 0 if first_width == width else 1
        return BackboneArchitecture("resnet", depths, width, first_stage=first_stage)
    if f"{body}stages.0.0.dwconv.weight" in weights:
        depths = tuple(count(weights, rf"{plain}stages\.{i}\.(\d+)\.") for i in range(4))
        width = weights[f"{body}downsample_layers.0.0.weight"].shape[0]
        first_stage = 0 if first_width == width else 1
        return BackboneArchitecture("convnext", depths, width, first_stage=first_stage)
    depths = tuple(count(weights, rf"{plain}layers\.{i}\.blocks\.(\d+)\.") for i in range(4))
    width = weights[f"{body}patch_embed.proj.weight"].shape[0]
    first_stage = 0 if first_width == width else 1
    block = f"{body}layers.0.blocks.0"
    if f"{block}.modulation.f.weight" in weights:
        levels = count(weights, rf"{re.escape(block)}\.modulation\.focal_layers\.(\d+)\.")
        kernels = tuple(
            weights[f"{block}.modulation.focal_layers.{i}.0.weight"].shape[-1]
            for i in range(levels)
        )
        return BackboneArchitecture(
            "focalnet", depths, width, kernels=kernels, first_stage=first_stage
        )
    tables = [
        weights[f"{body}layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(4)
    ]
    window = (round(tables[0].shape[0] ** 0.5) + 1) // 2
    heads = tuple(t.shape[1] for t in tables)
    return BackboneArchitecture("swin", depths, width, heads, window, first_stage=first_stage)
