"""D-FINE of Peterande/D-FINE; DEIM and RT-DETRv4 have its layout but other activations."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import DFineConfig, DFineForObjectDetection

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.huggingface.families import FAMILIES
from mfdetr_cache.detectors.names import Marks, Rules, count
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.translated.backbones import backbone_rules, read_backbone
from mfdetr_cache.detectors.translated.blueprint import (
    Blueprint,
    build_hybrid,
    hybrid_levels,
    input_size,
    points_of_levels,
    silu_mlp,
)
from mfdetr_cache.detectors.translated.rt_detr import (
    HYBRID_RULES,
    encoder_settings,
    is_deim_on_rt_detr,
    read_rt_detr_v2,
)

_QUERIES = 300

DECODER_RULES: Rules = (
    (r"^decoder\.decoder\.lqe_layers\.", "model.decoder.lqe_layers."),
    (r"^decoder\.(up|reg_scale)$", r"model.decoder.\1"),
    (r"^decoder\.pre_bbox_head\.", "model.decoder.pre_bbox_head."),
)
_RULES: Rules = (
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv1\.", r"\1.\2.conv1."),
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv2\.0\.", r"\1.\2.csp_rep1."),
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv2\.1\.", r"\1.\2.conv2."),
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv3\.0\.", r"\1.\2.csp_rep2."),
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv3\.1\.", r"\1.\2.conv3."),
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv4\.", r"\1.\2.conv4."),
    (r"downsample_convs\.(\d)\.0\.cv([12])\.", r"downsample_convs.\1.conv\2."),
    (r"\.linear1\.", ".mlp.layers.0."),
    (r"\.linear2\.", ".mlp.layers.1."),
    *DECODER_RULES,
    *HYBRID_RULES,
)
# Of RT-DETRv4: what its encoder is compared by with another network, in training.
_PROJECTOR = "encoder.feature_projector."
# The same values under a second name.
SECOND_NAMES = r"^decoder\.decoder\.(up|reg_scale)$"


_has_layout = Marks(
    (
        "decoder.decoder.layers.0.gateway.gate.weight",
        "decoder.decoder.layers.0.linear1.weight",
    )
)


def is_d_fine(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has D-FINE's layout, which is DEIM's too."""
    return _has_layout(tensors) and not any(key.startswith(_PROJECTOR) for key in tensors)


def is_rt_detr_v4(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is RT-DETRv4's: DEIM's with a projector of its training."""
    return _has_layout(tensors) and not is_d_fine(tensors)


def is_deim(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict can be DEIM's: D-FINE's layout, or RT-DETRv2's with another head."""
    return is_d_fine(tensors) or is_deim_on_rt_detr(tensors)


def read_d_fine(checkpoint: Checkpoint, options: DetectorOptions) -> Blueprint:
    """Blueprint of a D-FINE checkpoint."""
    config = _config(checkpoint.tensors, options, "relu")
    build = partial(build_hybrid, DFineForObjectDetection, config, checkpoint.tensors)
    return _blueprint(checkpoint.tensors, build, "relu")


def read_deim(checkpoint: Checkpoint, options: DetectorOptions) -> Blueprint:
    """Blueprint of a checkpoint of DEIM, on D-FINE or on RT-DETRv2, or of RT-DETRv4."""
    if is_deim_on_rt_detr(checkpoint.tensors):
        return read_rt_detr_v2(checkpoint, options)
    config = _config(checkpoint.tensors, options, "silu")
    return _blueprint(checkpoint.tensors, partial(_build_deim, config, checkpoint.tensors), "silu")


def decoder_settings(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Any]:
    """Configuration of a decoder that refines distributions, D-FINE's or DEIMv2's."""
    first = "decoder.decoder"
    quality = f"{first}.lqe_layers.0.reg_conf.layers"
    distances = tensors["decoder.dec_bbox_head.0.layers.2.bias"].shape[0]
    return {
        "d_model": tensors["decoder.enc_score_head.weight"].shape[1],
        "decoder_layers": count(tensors, r"decoder\.decoder\.layers\.(\d+)\."),
        "decoder_n_points": points_of_levels(
            tensors[f"{first}.layers.0.cross_attn.num_points_scale"], levels
        ),
        "num_feature_levels": levels,
        "num_labels": tensors["decoder.enc_score_head.weight"].shape[0],
        "max_num_bins": distances // 4 - 1,
        "top_prob_values": tensors[f"{quality}.0.weight"].shape[1] // 4 - 1,
        "lqe_hidden_dim": tensors[f"{quality}.0.weight"].shape[0],
        "lqe_layers": count(tensors, r"decoder\.decoder\.lqe_layers\.0\.reg_conf\.layers\.(\d+)\."),
        "num_denoising": 0,
    }


def hybrid_settings(tensors: Mapping[str, Tensor], levels: int, branch: int) -> dict[str, Any]:
    """Configuration of a hybrid encoder; ``branch`` are channels in its fusion blocks' branches."""
    settings = encoder_settings(tensors, levels)
    blocks = count(tensors, r"encoder\.fpn_blocks\.0\.cv2\.0\.bottlenecks\.(\d+)\.")
    return {
        **settings,
        # transformers takes the floor of half the expanded width; half a channel keeps it there.
        "hidden_expansion": (2 * branch + 1) / settings["encoder_hidden_dim"],
        "depth_mult": blocks / 3,
        "feat_strides": list(strides_of(levels)),
    }


def strides_of(levels: int) -> tuple[int, ...]:
    """Strides of so many levels, the last of which is 32."""
    return tuple(32 >> (levels - 1 - i) for i in range(levels))


def _config(
    tensors: Mapping[str, Tensor], options: DetectorOptions, activation: str
) -> DFineConfig:
    levels = hybrid_levels(tensors)
    backbone, channels = read_backbone(tensors, levels)
    branch = tensors["encoder.fpn_blocks.0.cv2.0.conv1.conv.weight"].shape[0]
    return DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=channels,
        decoder_ffn_dim=tensors["decoder.decoder.layers.0.linear1.weight"].shape[0],
        decoder_activation_function=activation,
        num_queries=options.num_queries or _QUERIES,
        **hybrid_settings(tensors, levels, branch),
        **decoder_settings(tensors, levels),
    )


def _blueprint(
    tensors: Mapping[str, Tensor], build: Callable[[], Any], activation: str
) -> Blueprint:
    levels = hybrid_levels(tensors)
    return Blueprint(
        family=FAMILIES["d_fine"],
        build=build,
        rules=(*backbone_rules(tensors, "model.backbone.model"), *_RULES),
        tensors=tensors,
        input_hw=input_size(tensors, strides_of(levels)),
        normalise=False,
        unused=f"{SECOND_NAMES}|^{_PROJECTOR}",
        choices={"activation": activation},
    )


def _build_deim(config: DFineConfig, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    model = build_hybrid(DFineForObjectDetection, config, tensors)
    decoder = model.model.decoder
    model.model.enc_bbox_head = silu_mlp(model.model.enc_bbox_head)
    decoder.query_pos_head = silu_mlp(decoder.query_pos_head)
    decoder.pre_bbox_head = silu_mlp(decoder.pre_bbox_head)
    decoder.bbox_embed = nn.ModuleList(silu_mlp(head) for head in decoder.bbox_embed)
    for layer in decoder.lqe_layers:
        layer.reg_conf = silu_mlp(layer.reg_conf)
    return model
