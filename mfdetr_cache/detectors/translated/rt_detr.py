"""RT-DETR and RT-DETRv2 of lyuwenyu/RT-DETR, and DEIM's variant of the second."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.huggingface.families import FAMILIES
from mfdetr_cache.detectors.names import Marks, Rules, count
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.translated.backbones import backbone_rules, read_backbone
from mfdetr_cache.detectors.translated.blueprint import (
    Blueprint,
    Mlp,
    build_hybrid,
    hybrid_levels,
    input_size,
    no_weights,
    points_of_levels,
    silu_mlp,
)
from mfdetr_cache.errors import DetectorError

_HEADS = 8
_QUERIES = 300
_STRIDES = (8, 16, 32)

# The hybrid encoder and everything around the decoder; D-FINE and DEIMv2 keep most of it.
HYBRID_RULES: Rules = (
    (r"^encoder\.encoder\.(\d+)\.", r"model.encoder.aifi.\1."),
    (r"(aifi\..*)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(aifi\..*)\.norm2\.", r"\1.final_layer_norm."),
    (r"\.self_attn\.in_proj_", ".self_attn.{q,k,v}_proj."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"^encoder\.input_proj\.(\d)\.(?:0|conv)\.", r"model.encoder_input_proj.\1.0."),
    (r"^encoder\.input_proj\.(\d)\.(?:1|norm)\.", r"model.encoder_input_proj.\1.1."),
    (r"^encoder\.", "model.encoder."),
    (r"^decoder\.input_proj\.(\d)\.conv\.", r"model.decoder_input_proj.\1.0."),
    (r"^decoder\.input_proj\.(\d)\.norm\.", r"model.decoder_input_proj.\1.1."),
    (r"^decoder\.decoder\.layers\.", "model.decoder.layers."),
    (r"(model\.decoder\.layers\..*)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(model\.decoder\.layers\..*)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"(model\.decoder\.layers\..*)\.norm3\.", r"\1.final_layer_norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"^decoder\.enc_output\.proj\.", "model.enc_output.0."),
    (r"^decoder\.enc_output\.norm\.", "model.enc_output.1."),
    (r"^decoder\.enc_", "model.enc_"),
    (r"^decoder\.query_pos_head\.", "model.decoder.query_pos_head."),
    (r"^decoder\.dec_score_head\.", "model.decoder.class_embed."),
    (r"^decoder\.dec_bbox_head\.", "model.decoder.bbox_embed."),
)
_FEED_FORWARD: Rules = (
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.num_points_scale$", ".n_points_scale"),
)


_VALUES = "decoder.decoder.layers.0.cross_attn.value_proj.weight"
_POINTS = "decoder.decoder.layers.0.cross_attn.num_points_scale"
_THIRD_LAYER = "decoder.query_pos_head.layers.2.weight"
# RT-DETR's attention has no table of points, and its query position two layers where DEIM's has
# three.
is_rt_detr = Marks((_VALUES, "encoder.fpn_blocks.0.conv1.conv.weight"), (_POINTS,))
is_rt_detr_v2 = Marks((_VALUES, _POINTS), (_THIRD_LAYER,))
is_deim_on_rt_detr = Marks((_VALUES, _POINTS, _THIRD_LAYER))


def read_rt_detr(
    checkpoint: Checkpoint, options: DetectorOptions, *, freeze_batch_norms: bool = True
) -> Blueprint:
    """Blueprint of a checkpoint of ``rtdetr_pytorch``; frozen batch norms have its epsilon."""
    tensors = checkpoint.tensors
    config = RTDetrConfig(
        **_common(tensors, options), freeze_backbone_batch_norms=freeze_batch_norms
    )
    build = partial(build_hybrid, RTDetrForObjectDetection, config, tensors)
    return _blueprint("rt_detr", tensors, build, {})


def read_rt_detr_v2(
    checkpoint: Checkpoint, options: DetectorOptions, sampling: str = "default"
) -> Blueprint:
    """Blueprint of a checkpoint of ``rtdetrv2_pytorch``, or of DEIM (other activations).

    ``sampling`` is ``default`` (bilinear) or ``discrete``; the file does not say. DetectorError if
    the levels have different numbers of sampling points.
    """
    tensors = checkpoint.tensors
    common = _common(tensors, options)
    points = points_of_levels(tensors[_POINTS], common["num_feature_levels"])
    if len(set(points)) > 1:
        raise DetectorError(
            f"{checkpoint.path}: {points} sampling points per level; only equal numbers are read"
        )
    deim = is_deim_on_rt_detr(tensors)
    config = RTDetrV2Config(
        **common,
        decoder_n_levels=common["num_feature_levels"],
        decoder_method=sampling,
        decoder_activation_function="silu" if deim else "relu",
    )
    build = (
        partial(_build_deim, config, tensors)
        if deim
        else partial(build_hybrid, RTDetrV2ForObjectDetection, config, tensors)
    )
    choices: dict[str, object] = {"sampling": sampling}
    return _blueprint("rt_detr_v2", tensors, build, choices)


def encoder_settings(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Any]:
    """Configuration of a hybrid encoder, but for its fusion blocks."""
    hidden = tensors["encoder.lateral_convs.0.conv.weight"].shape[0]
    intra = count(tensors, r"encoder\.encoder\.(\d+)\.")
    return {
        "encoder_hidden_dim": hidden,
        "encoder_ffn_dim": tensors["encoder.encoder.0.layers.0.linear1.weight"].shape[0],
        "encoder_layers": count(tensors, r"encoder\.encoder\.0\.layers\.(\d+)\."),
        "encode_proj_layers": list(range(levels - intra, levels)),
        "decoder_in_channels": [hidden] * levels,
    }


def _common(tensors: Mapping[str, Tensor], options: DetectorOptions) -> dict[str, Any]:
    levels = hybrid_levels(tensors)
    backbone, channels = read_backbone(tensors, levels)
    encoder = encoder_settings(tensors, levels)
    width = tensors["decoder.enc_score_head.weight"].shape[1]
    samples = tensors["decoder.decoder.layers.0.cross_attn.attention_weights.bias"].shape[0]
    decoder_levels = count(tensors, r"decoder\.input_proj\.(\d+)\.")
    branch = tensors["encoder.fpn_blocks.0.conv1.conv.weight"].shape[0]
    return {
        "backbone_config": backbone,
        "encoder_in_channels": channels,
        **encoder,
        "hidden_expansion": branch / encoder["encoder_hidden_dim"],
        "d_model": width,
        "num_feature_levels": decoder_levels,
        "decoder_ffn_dim": tensors["decoder.decoder.layers.0.linear1.weight"].shape[0],
        "decoder_layers": _layers_that_count(tensors),
        "decoder_n_points": samples // (decoder_levels * _HEADS),
        "num_labels": tensors["decoder.enc_score_head.weight"].shape[0],
        "num_queries": options.num_queries or _QUERIES,
        "num_denoising": 0,
    }


def _layers_that_count(tensors: Mapping[str, Tensor]) -> int:
    """Decoder layers up to the one whose output is used.

    R50vd-m is trained with six and read after the third (``eval_idx: 2``, which the file does not
    say); of all published sizes it alone has a ResNet-50 with a narrow encoder.
    """
    layers = count(tensors, r"decoder\.decoder\.layers\.(\d+)\.")
    bottleneck = "backbone.res_layers.0.blocks.0.branch2c.conv.weight" in tensors
    narrow = "encoder.fpn_blocks.0.conv3.conv.weight" in tensors
    return 3 if bottleneck and narrow and layers == 6 else layers


def _blueprint(
    model_type: str,
    tensors: Mapping[str, Tensor],
    build: Callable[[], Any],
    choices: dict[str, object],
) -> Blueprint:
    kept = _layers_that_count(tensors)
    late = f"[{kept}-9]"
    return Blueprint(
        family=FAMILIES[model_type],
        build=build,
        rules=(*backbone_rules(tensors, "model.backbone.model"), *_FEED_FORWARD, *HYBRID_RULES),
        tensors=tensors,
        input_hw=input_size(tensors, _STRIDES),
        normalise=False,
        unused=rf"^decoder\.(decoder\.layers|dec_score_head|dec_bbox_head)\.{late}\.",
        choices=choices,
    )


def _build_deim(config: RTDetrV2Config, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    model = build_hybrid(RTDetrV2ForObjectDetection, config, tensors)
    decoder, width = model.model.decoder, config.d_model
    with no_weights():
        layers = nn.ModuleList(nn.Linear(n, width) for n in (4, width, width))
    decoder.query_pos_head = Mlp(layers, nn.SiLU())
    model.model.enc_bbox_head = silu_mlp(model.model.enc_bbox_head)
    decoder.bbox_embed = nn.ModuleList(silu_mlp(head) for head in decoder.bbox_embed)
    return model
