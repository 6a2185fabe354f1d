"""LW-DETR of Atten4Vis/LW-DETR; its projector and decoder serve RF-DETR too."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import LwDetrConfig, LwDetrForObjectDetection, LwDetrViTConfig

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.huggingface.families import FAMILIES
from mfdetr_cache.detectors.names import Marks, Rules, count
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.translated.blueprint import Blueprint, no_weights
from mfdetr_cache.errors import DetectorError

# Takes out_indices, which its signature does not say.
VIT_CONFIG: Any = LwDetrViTConfig
_SIDE = 640
_WINDOWS_PER_SIDE = 4
_VIT_HEADS = 12  # of every published size
# Blocks with windows and blocks whose outputs are read, counted from 0, by the number of blocks.
_WINDOWS = {6: [0, 2, 4], 10: [0, 1, 3, 6, 7, 9]}
_OUTPUTS = {6: [1, 3, 5], 10: [2, 4, 5, 9]}
_VIT = "backbone.0.encoder."
_PROJECTOR = "backbone.0.projector."

DECODER_RULES: Rules = (
    (r"^backbone\.0\.projector\.stages_sampling\.(\d)\.(\d)\.", r"P\1.sampling_layers.\2.layers."),
    (r"^backbone\.0\.projector\.stages\.(\d)\.1\.", r"P\1.layer_norm."),
    (r"^backbone\.0\.projector\.stages\.(\d)\.0\.", r"P\1.projector_layer."),
    (r"^(P.*)\.m\.(\d)\.", r"\1.bottlenecks.\2."),
    (r"^(P.*)\.cv([12])\.", r"\1.conv\2."),
    (r"^(P.*)\.bn\.", r"\1.norm."),
    (r"^P(\d)\.", r"model.backbone.projector.scale_layers.\1."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^transformer\.", "model."),
    (r"^(model\.decoder\..*)\.linear([12])\.", r"\1.mlp.fc\2."),
    (r"^(model\.decoder\..*)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"^(model\.decoder\..*)\.norm2\.", r"\1.cross_attn_layer_norm."),
    (r"^(model\.decoder\..*)\.norm3\.", r"\1.layer_norm."),
    (r"\.self_attn\.in_proj_", ".self_attn.{q,k,v}_proj."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"^refpoint_embed\.", "model.reference_point_embed."),
    (r"^query_feat\.", "model.query_feat."),
)
_VIT_RULES: Rules = (
    (r"^backbone\.0\.encoder\.pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^backbone\.0\.encoder\.patch_embed\.proj\.", "vit.embeddings.projection."),
    (r"^backbone\.0\.encoder\.blocks\.", "vit.encoder.layer."),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    (r"\.attn\.qkv\.weight$", ".attention.{q,k,v}_proj.weight"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"^(vit\..*)\.norm1\.", r"\1.layernorm_before."),
    (r"^(vit\..*)\.norm2\.", r"\1.layernorm_after."),
    (r"^(vit\..*)\.mlp\.", r"\1.intermediate."),
    (r"^vit\.", "model.backbone.backbone."),
)


# Grouped queries and a plain ViT with scaled branches.
is_lw_detr = Marks(("query_feat.weight", f"{_VIT}blocks.0.gamma_1"))


def read_lw_detr(checkpoint: Checkpoint, options: DetectorOptions) -> Blueprint:
    """Blueprint of an LW-DETR checkpoint; DetectorError for a ViT depth with unknown windows."""
    tensors, settings = checkpoint.tensors, checkpoint.settings
    depth = count(tensors, r"backbone\.0\.encoder\.blocks\.(\d+)\.")
    windows = settings.get("window_block_indexes") or _WINDOWS.get(depth)
    outputs = settings.get("out_feature_indexes") or _OUTPUTS.get(depth)
    if windows is None or outputs is None:
        raise DetectorError(
            f"{checkpoint.path}: a ViT of {depth} blocks; which of them have windows stands in no "
            "file, and is known for 6 and 10 blocks"
        )
    table = tensors[f"{_VIT}pos_embed"].shape[1] - 1
    patch = tensors[f"{_VIT}patch_embed.proj.weight"].shape[-1]
    backbone = VIT_CONFIG(
        hidden_size=tensors[f"{_VIT}pos_embed"].shape[-1],
        num_hidden_layers=depth,
        num_attention_heads=_VIT_HEADS,
        image_size=_SIDE,
        pretrain_image_size=round(table**0.5) * patch,
        patch_size=patch,
        window_block_indices=list(windows),
        # transformers counts the patch embedding as the first stage.
        out_indices=[i + 1 for i in outputs],
    )
    config = LwDetrConfig(
        backbone_config=backbone, **decoder_settings(checkpoint, scales(tensors), options)
    )
    return Blueprint(
        family=FAMILIES["lw_detr"],
        build=partial(_build, config),
        rules=(*_VIT_RULES, *DECODER_RULES),
        tensors=tensors,
        input_hw=(_SIDE, _SIDE),
        normalise=True,
        side_multiple=patch * _WINDOWS_PER_SIDE,
    )


def scales(tensors: Mapping[str, Tensor]) -> list[float]:
    """Size of each map of the projector relative to the ViT's, inferred from its sampling layers.

    2 (transposed convolution), 1 or 0.5 (strided convolution).
    """
    found: list[float] = []
    for stage in range(count(tensors, r"backbone\.0\.projector\.stages\.(\d+)\.")):
        sampling = f"{_PROJECTOR}stages_sampling.{stage}.0."
        if f"{sampling}0.weight" in tensors or f"{sampling}1.weight" in tensors:
            found.append(2.0)
        else:
            found.append(0.5 if f"{sampling}0.conv.weight" in tensors else 1.0)
    return found


def decoder_settings(
    checkpoint: Checkpoint, factors: Sequence[float], options: DetectorOptions
) -> dict[str, Any]:
    """Configuration of decoder and projector.

    ``factors`` are the scales of the projector's maps. Queries beyond the first group are for
    training. DetectorError for more queries than the table has, or arguments that are not read.
    """
    tensors = checkpoint.tensors
    rows, width = tensors["query_feat.weight"].shape
    groups = count(tensors, r"transformer\.enc_output\.(\d+)\.")
    own = rows // groups
    queries = options.num_queries or own
    if not 1 <= queries <= own:
        raise DetectorError(f"--num-queries {queries}: this detector has 1 to {own}")
    # Every published size has self-attention heads of 32 channels and cross-attention heads of 16.
    samples = tensors["transformer.decoder.layers.0.cross_attn.attention_weights.bias"].shape[0]
    cross = width // 16
    flags = dict.fromkeys(("two_stage", "bbox_reparam", "lite_refpoint_refine"), True)
    checkpoint.require_settings({"sa_nheads": width // 32, "ca_nheads": cross, **flags})
    block = f"{_PROJECTOR}stages.0.0"
    return {
        "projector_scale_factors": list(factors),
        "hidden_expansion": tensors[f"{block}.cv1.conv.weight"].shape[0] / 2 / width,
        "c2f_num_blocks": count(tensors, block.replace(".", r"\.") + r"\.m\.(\d+)\."),
        "d_model": width,
        "decoder_layers": count(tensors, r"transformer\.decoder\.layers\.(\d+)\."),
        "decoder_ffn_dim": tensors["transformer.decoder.layers.0.linear1.weight"].shape[0],
        "decoder_self_attention_heads": width // 32,
        "decoder_cross_attention_heads": cross,
        "decoder_n_points": samples // (cross * len(factors)),
        "num_queries": queries,
        "group_detr": groups,
        "num_labels": tensors["class_embed.weight"].shape[0],
        "dropout": 0.0,
    }


def _build(config: LwDetrConfig) -> Any:  # noqa: ANN401
    with no_weights():
        return LwDetrForObjectDetection(config)
