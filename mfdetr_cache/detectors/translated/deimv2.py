"""DEIMv2 of Intellindust-AI-Lab/DEIMv2, on HGNetV2 and on DINOv3."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import Deimv2Config, Deimv2ForObjectDetection, DINOv3ViTConfig

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.huggingface.deimv2 import restore_original_deimv2
from mfdetr_cache.detectors.huggingface.families import FAMILIES
from mfdetr_cache.detectors.names import Marks, Rules, count
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.translated.backbones import backbone_rules, read_backbone
from mfdetr_cache.detectors.translated.blueprint import (
    Blueprint,
    build_hybrid,
    hybrid_levels,
    input_size,
)
from mfdetr_cache.detectors.translated.d_fine import (
    DECODER_RULES,
    SECOND_NAMES,
    decoder_settings,
    hybrid_settings,
    strides_of,
)
from mfdetr_cache.detectors.translated.rt_detr import HYBRID_RULES

# Takes out_indices, which its signature does not say.
_VIT_CONFIG: Any = DINOv3ViTConfig
# Queries of the published sizes with a light encoder, by width; all others have 300.
_QUERIES = {64: 100, 96: 150, 112: 200}
_SIDES = {64: 320, 96: 416}
_HEAD_WIDTH = 64  # of DINOv3 and of the small ViTs distilled from it
_VIT, _META = "backbone.dinov3._model.", "backbone.dinov3."

_RULES: Rules = (
    (r"(fpn_blocks?|pan_blocks?)((?:\.\d)?)\.cv1\.", r"\1\2.conv1."),
    (r"(fpn_blocks?|pan_blocks?)((?:\.\d)?)\.cv([23])\.0\.", r"\1\2.csp_rep\3."),
    (r"(fpn_blocks?|pan_blocks?)((?:\.\d)?)\.cv([23])\.1\.", r"\1\2.csp_rep\3.conv2."),
    (r"(fpn_blocks?|pan_blocks?)((?:\.\d)?)\.cv4\.", r"\1\2.conv2."),
    (r"csp_rep2\.", "csp_rep1."),
    (r"csp_rep3\.", "csp_rep2."),
    (r"downsample_convs\.(\d)\.0\.cv([12])\.", r"downsample_convs.\1.conv\2."),
    (r"^encoder\.down_sample([12])\.1\.", r"encoder.down_conv\1.conv."),
    (r"^encoder\.down_sample([12])\.2\.", r"encoder.down_conv\1.norm."),
    (r"^encoder\.bi_fusion\.cv\.", "encoder.bi_fusion_conv."),
    (r"\.swish_ffn\.w12\.", ".mlp.{gate,up}_proj."),
    (r"\.swish_ffn\.w3\.", ".mlp.down_proj."),
    (r"(norm\d?)\.scale$", r"\1.weight"),
    (r"^(encoder\.encoder\..*)\.linear1\.", r"\1.mlp.layers.0."),
    (r"^(encoder\.encoder\..*)\.linear2\.", r"\1.mlp.layers.1."),
    *DECODER_RULES,
)
# The hybrid encoder reads projections that transformers keeps beside the backbone; the light one
# has its own.
_PROJECTIONS: Rules = ((r"^encoder\.input_proj\.", "model.conv_encoder.encoder_input_proj."),)
_LIGHT_PLACES: Rules = (
    (r"^encoder\.input_proj\.", "model.encoder.input_proj."),
    # All layers have one box head, which the file lists again for each of them.
    (r"^decoder\.dec_bbox_head\.\d+\.", "decoder.dec_bbox_head.0."),
)
_DINO_RULES: Rules = (
    (r"^backbone\.dinov3\.(_model\.)?", "vit."),
    (r"^vit\.cls_token$", "vit.embeddings.cls_token"),
    (r"^vit\.storage_tokens$", "vit.embeddings.register_tokens"),
    (r"^vit\.patch_embed\.proj\.", "vit.embeddings.patch_embeddings."),
    (r"^vit\.blocks\.", "vit.model.layer."),
    (r"\.attn\.qkv\.", ".attention.{q,k,v}_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"^(vit\..*)\.mlp\.(?:fc1|w2)\.", r"\1.mlp.up_proj."),
    (r"^(vit\..*)\.mlp\.(?:fc2|w3)\.", r"\1.mlp.down_proj."),
    (r"^(vit\..*)\.mlp\.w1\.", r"\1.mlp.gate_proj."),
    (r"^vit\.", "model.conv_encoder.backbone."),
    (r"^backbone\.sta\.(stem|conv2)\.0\.", r"sta.\1.conv."),
    (r"^backbone\.sta\.(stem|conv2)\.1\.", r"sta.\1.norm."),
    (r"^backbone\.sta\.(conv[34])\.1\.", r"sta.\1.conv."),
    (r"^backbone\.sta\.(conv[34])\.2\.", r"sta.\1.norm."),
    (r"^sta\.stem\.", "sta.stem_conv."),
    (r"^sta\.", "model.conv_encoder.spatial_tuning_adapter."),
    (r"^backbone\.convs\.(\d)\.", r"model.conv_encoder.fusion_proj.\1.conv."),
    (r"^backbone\.norms\.(\d)\.", r"model.conv_encoder.fusion_proj.\1.norm."),
)


# Its decoder has SwiGLU.
is_deimv2 = Marks(("decoder.decoder.layers.0.swish_ffn.w12.weight",))


def read_deimv2(checkpoint: Checkpoint, options: DetectorOptions) -> Blueprint:
    """Blueprint of a DEIMv2 checkpoint."""
    tensors = checkpoint.tensors
    light = "encoder.bi_fusion.cv.conv.weight" in tensors
    dino = "backbone.sta.stem.0.weight" in tensors
    levels = 2 if light else hybrid_levels(tensors)
    width = tensors["decoder.enc_score_head.weight"].shape[1]
    queries = options.num_queries or (_QUERIES.get(width, 300) if light else 300)
    config = Deimv2Config(
        num_queries=queries,
        decoder_ffn_dim=tensors["decoder.decoder.layers.0.swish_ffn.w12.weight"].shape[0],
        decoder_activation_function="silu",
        use_gateway="decoder.decoder.layers.0.gateway.gate.weight" in tensors,
        share_bbox_head=light,
        **(_light_encoder(tensors) if light else _hybrid_encoder(tensors, levels)),
        **(_dino_backbone(tensors) if dino else _hgnet_backbone(tensors, light=light)),
        **decoder_settings(tensors, levels),
    )
    return Blueprint(
        family=FAMILIES["deimv2"],
        build=partial(_build, config, tensors),
        rules=(
            *(_DINO_RULES if dino else backbone_rules(tensors, "model.conv_encoder.model")),
            *_RULES,
            *(_LIGHT_PLACES if light else _PROJECTIONS),
            *HYBRID_RULES,
        ),
        tensors=_with_masked_biases(tensors),
        input_hw=input_size(tensors, strides_of(levels), _SIDES.get(width, 640) if light else 640),
        normalise=dino,
        unused=rf"{SECOND_NAMES}|mask_token$|rope_embed\.periods$|\.bias_mask$",
    )


def _vit_place(tensors: Mapping[str, Tensor]) -> str:
    return _VIT if f"{_VIT}cls_token" in tensors else _META


def _light_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """LiteEncoder: one level of the backbone, the second by average pooling."""
    hidden = tensors["encoder.bi_fusion.cv.conv.weight"].shape[0]
    branch = tensors["encoder.fpn_block.cv2.0.conv1.conv.weight"].shape[0] // 2
    blocks = count(tensors, r"encoder\.fpn_block\.cv2\.0\.bottlenecks\.(\d+)\.")
    return {
        "encoder_type": "lite",
        "encoder_hidden_dim": hidden,
        "hidden_expansion": (2 * branch + 1) / hidden,
        "depth_mult": blocks / 3,
        "decoder_in_channels": [hidden, hidden],
        "feat_strides": [16, 32],
        "encoder_has_trailing_conv": "encoder.fpn_block.cv2.1.conv.weight" in tensors,
    }


def _hybrid_encoder(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Any]:
    branch = tensors["encoder.fpn_blocks.0.cv2.0.conv1.conv.weight"].shape[0] // 2
    settings = hybrid_settings(tensors, levels, branch)
    fused = tensors["encoder.fpn_blocks.0.cv1.conv.weight"].shape[1]
    return {
        **settings,
        "encoder_type": "hybrid",
        "encoder_fuse_op": "sum" if fused == settings["encoder_hidden_dim"] else "cat",
        "encoder_has_trailing_conv": "encoder.fpn_blocks.0.cv2.1.conv.weight" in tensors,
    }


def _hgnet_backbone(tensors: Mapping[str, Tensor], *, light: bool) -> dict[str, Any]:
    outputs = 1 if light else hybrid_levels(tensors)
    backbone, channels = read_backbone(tensors, outputs)
    return {"backbone_config": backbone, "encoder_in_channels": channels}


def _dino_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """DINOv3 as Meta made it, or the smaller ViT distilled from it (no norm at its end)."""
    small = f"{_VIT}cls_token" in tensors
    place = _vit_place(tensors)
    width = tensors[f"{place}cls_token"].shape[-1]
    registers = tensors.get(f"{place}storage_tokens")
    gated = f"{place}blocks.0.mlp.w1.weight" in tensors
    inner = tensors[f"{place}blocks.0.mlp.{'w1' if gated else 'fc1'}.weight"].shape[0]
    fused = tensors["backbone.convs.0.weight"].shape[0]
    return {
        "backbone_config": _VIT_CONFIG(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=count(tensors, place.replace(".", r"\.") + r"blocks\.(\d+)\."),
            num_attention_heads=width // _HEAD_WIDTH,
            num_register_tokens=0 if registers is None else registers.shape[1],
            patch_size=tensors[f"{place}patch_embed.proj.weight"].shape[-1],
            key_bias=True,
            use_gated_mlp=gated,
            hidden_act="silu" if gated else "gelu",
            layer_norm_eps=1e-6 if small else 1e-5,
            apply_layernorm=not small,
            # The blocks whose outputs are read, counted from 1; not in the file, all sizes agree.
            out_indices=[4, 8, 12] if small else [6, 9, 12],
        ),
        "encoder_in_channels": [fused] * 3,
        "spatial_tuning_adapter_inplanes": tensors["backbone.sta.stem.0.weight"].shape[0],
    }


def _with_masked_biases(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """DINOv3 multiplies the biases of queries, keys and values with a mask it keeps beside them."""
    masks = [key for key in tensors if key.endswith(".qkv.bias_mask")]
    masked = {k.removesuffix("_mask"): tensors[k.removesuffix("_mask")] * tensors[k] for k in masks}
    return {**tensors, **masked}


def _build(config: Deimv2Config, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    model = build_hybrid(Deimv2ForObjectDetection, config, tensors)
    if config.share_bbox_head:
        heads = model.model.decoder.bbox_embed
        model.model.decoder.bbox_embed = nn.ModuleList([heads[0]] * len(heads))
    restore_original_deimv2(model)
    periods = tensors.get(f"{_vit_place(tensors)}rope_embed.periods")
    if periods is not None:
        _restore_dino(model.model.conv_encoder.backbone, periods)
    return model


def _restore_dino(vit: Any, periods: Tensor) -> None:  # noqa: ANN401
    """Frequencies from the file, and nothing that its ViT does not have."""
    vit.rope_embeddings.inv_freq = 1 / periods.float()
    vit.embeddings.mask_token = None
    if vit.config.num_register_tokens == 0:
        del vit.embeddings.register_tokens
        vit.embeddings.register_tokens = nn.Buffer(
            periods.new_zeros(1, 0, vit.config.hidden_size), persistent=False
        )
    if not vit.config.apply_layernorm:
        # transformers norms the last of its maps also then.
        vit.norm = nn.Identity()
        for layer in vit.model.layer:
            layer.layer_scale1 = layer.layer_scale2 = nn.Identity()
