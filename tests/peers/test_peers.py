"""transformers' detectors beside an implementation that shares no code with them.

``libreyolo`` keeps PyTorch code of the detectors' authors, with the names of their checkpoints. Its
models get random weights, these are renamed into transformers' names, and both must agree. Without
the package the tests are skipped; ``make peers`` installs it.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    LwDetrConfig,
    LwDetrForObjectDetection,
    LwDetrViTConfig,
    RfDetrConfig,
    RfDetrForObjectDetection,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

from mfdetr_cache.detectors.registry import load_detector

pytest.importorskip("libreyolo", reason="libreyolo is not installed")

SIDE = 384
# Names in the authors' checkpoints, and in transformers'. The first rule that fits applies, then
# the rules after it.
_SHARED = [
    (r"^encoder\.encoder\.(\d+)\.", r"model.encoder.aifi.\1."),
    (r"(aifi.*)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(aifi.*)\.norm2\.", r"\1.final_layer_norm."),
    (r"^decoder\.decoder\.layers", "model.decoder.layers"),
    (r"(model\.decoder\.layers.*)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(model\.decoder\.layers.*)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"(model\.decoder\.layers.*)\.norm3\.", r"\1.final_layer_norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"self_attn\.out_proj", "self_attn.o_proj"),
    (r"^encoder\.input_proj\.(\d)\.conv", r"model.encoder_input_proj.\1.0"),
    (r"^encoder\.input_proj\.(\d)\.norm", r"model.encoder_input_proj.\1.1"),
    (r"^encoder\.input_proj", "model.encoder_input_proj"),
    (r"^encoder\.", "model.encoder."),
    (r"^decoder\.input_proj\.(\d)\.conv", r"model.decoder_input_proj.\1.0"),
    (r"^decoder\.input_proj\.(\d)\.norm", r"model.decoder_input_proj.\1.1"),
    (r"^decoder\.enc_output\.proj", "model.enc_output.0"),
    (r"^decoder\.enc_output\.norm", "model.enc_output.1"),
    (r"^decoder\.(denoising_class_embed|enc_)", r"model.\1"),
    (r"^decoder\.(query_pos_head|pre_bbox_head)", r"model.decoder.\1"),
    (r"^decoder\.decoder\.lqe_layers", "model.decoder.lqe_layers"),
    (r"^decoder\.(up|reg_scale)$", r"model.decoder.\1"),
    (r"^decoder\.dec_score_head", "model.decoder.class_embed"),
    (r"^decoder\.dec_bbox_head", "model.decoder.bbox_embed"),
]
_PRESNET = [
    (r"^backbone\.conv1\.conv1_(\d)\.", lambda m: f"embedder.embedder.{int(m[1]) - 1}."),
    (r"^backbone\.res_layers\.(\d)\.blocks\.(\d)\.", r"encoder.stages.\1.layers.\2."),
    (r"num_points_scale", "n_points_scale"),
    (r"\.short\.conv\.(conv|norm)", r".shortcut.1.\1"),
    (r"\.short\.", ".shortcut."),
    (r"\.branch2([abc])\.", lambda m: f".layer.{'abc'.index(m[1])}."),
    (r"^((?:embedder|encoder\.stages).*)\.conv\.", r"\1.convolution."),
    (r"^((?:embedder|encoder\.stages).*)\.norm\.", r"\1.normalization."),
    (r"^(embedder|encoder\.stages)", r"model.backbone.model.\1"),
    (r"^(model\.(?:encoder|decoder)\..*)\.linear([12])\.", r"\1.mlp.fc\2."),
    (r"^((?:encoder|decoder)\..*)\.linear([12])\.", r"\1.mlp.fc\2."),
]
_HGNET = [
    (r"^backbone\.stem", "embedder"),
    (r"^backbone\.", "encoder."),
    (r"^((?:embedder|encoder\.stages).*)\.conv\.", r"\1.convolution."),
    (r"^((?:embedder|encoder\.stages).*)\.(?:norm|bn)\.", r"\1.normalization."),
    (r"^(embedder|encoder\.stages)", r"model.backbone.model.\1"),
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv1\.", r"\1.\2.conv1."),
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv2\.0\.", r"\1.\2.csp_rep1."),
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv2\.1\.", r"\1.\2.conv2."),
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv3\.0\.", r"\1.\2.csp_rep2."),
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv3\.1\.", r"\1.\2.conv3."),
    (r"(fpn_blocks|pan_blocks)\.(\d)\.cv4\.", r"\1.\2.conv4."),
    (r"downsample_convs\.(\d)\.0\.cv([12])\.", r"downsample_convs.\1.conv\2."),
    (r"^((?:encoder|decoder)\..*)\.linear1\.", r"\1.mlp.layers.0."),
    (r"^((?:encoder|decoder)\..*)\.linear2\.", r"\1.mlp.layers.1."),
]
_LW_DETR = [
    (r"^backbone\.0\.encoder\.pos_embed", "model.backbone.backbone.embeddings.position_embeddings"),
    (r"^backbone\.0\.encoder\.patch_embed\.proj", "model.backbone.backbone.embeddings.projection"),
    (r"^backbone\.0\.encoder\.blocks", "model.backbone.backbone.encoder.layer"),
    (r"\.attn\.([qv])_bias", r".attention.\1_proj.bias"),
    (r"\.attn\.qkv\.", ".attention.in_proj_"),
    (r"\.attn\.proj", ".attention.o_proj"),
    (r"(backbone\..*)\.norm1\.", r"\1.layernorm_before."),
    (r"(backbone\..*)\.norm2\.", r"\1.layernorm_after."),
    (r"(backbone\..*)\.mlp\.", r"\1.intermediate."),
]
_RF_DETR = [
    (r"^backbone\.0\.encoder\.encoder\.", "model.backbone.backbone."),
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
]
_PROJECTOR = [
    (r"^backbone\.0\.projector\.stages\.(\d)\.1\.", r"P.\1.layer_norm."),
    (r"^backbone\.0\.projector\.stages\.(\d)\.0\.", r"P.\1.projector_layer."),
    (r"^(P.*)\.m\.(\d)\.", r"\1.bottlenecks.\2."),
    (r"^(P.*)\.cv([12])\.", r"\1.conv\2."),
    (r"^(P.*)\.bn\.", r"\1.norm."),
    (r"^P\.", "model.backbone.projector.scale_layers."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^transformer\.", "model."),
    (r"^(model\.decoder.*)\.linear([12])\.", r"\1.mlp.fc\2."),
    (r"^(model\.decoder.*)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"^(model\.decoder.*)\.norm2\.", r"\1.cross_attn_layer_norm."),
    (r"^(model\.decoder.*)\.norm3\.", r"\1.layer_norm."),
    (r"self_attn\.out_proj", "self_attn.o_proj"),
    (r"^refpoint_embed", "model.reference_point_embed"),
    (r"^query_feat", "model.query_feat"),
]
# RF-DETR's projector has one scale and no list of them.
_ONE = (r"projector\.scale_layers\.0\.", "projector.")
_NOT_LEARNED = re.compile(
    r"num_batches_tracked|anchors|valid_mask|_kp_active_mask|^decoder\.decoder\.(up|reg_scale)$"
)


def renamed(weights: Mapping[str, Tensor], rules: list[tuple[str, Any]]) -> dict[str, Tensor]:
    """Weights under transformers' names, packed projections taken apart."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        if _NOT_LEARNED.search(name):
            continue
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if "in_proj_" in new:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                found[new.replace("in_proj_", f"{part}_proj.")] = piece.clone()
        else:
            found[new] = value.clone()
    return found


def enliven(model: nn.Module) -> None:
    """Random weights with which every part matters, batch norms' statistics included."""
    generator = torch.Generator().manual_seed(11)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 0.3 if "score_head" in name else parameter[0].numel() ** -0.5
                parameter.copy_(scale * noise(parameter))
            elif name.endswith(("reg_scale", "up")):
                continue
            else:
                parameter.add_(0.1 * noise(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * noise(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(1 + 0.2 * noise(buffer).abs())


def rt_detr() -> tuple[nn.Module, type, Any, list[tuple[str, Any]]]:
    from libreyolo.models.rtdetr.nn import RTDETRModel

    config = RTDetrConfig(**_rt_detr_settings())
    return RTDETRModel(num_queries=50), RTDetrForObjectDetection, config, [*_PRESNET, *_SHARED]


def rt_detr_v2() -> tuple[nn.Module, type, Any, list[tuple[str, Any]]]:
    from libreyolo.models.rtdetrv2.nn import RTDETRv2Model

    config = RTDetrV2Config(**_rt_detr_settings())
    model = RTDETRv2Model(num_queries=50, num_decoder_layers=3)
    return model, RTDetrV2ForObjectDetection, config, [*_PRESNET, *_SHARED]


def _rt_detr_settings() -> dict[str, Any]:
    backbone = RTDetrResNetConfig(
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return {
        "backbone_config": backbone,
        "encoder_in_channels": [128, 256, 512],
        "decoder_layers": 3,
        "hidden_expansion": 0.5,
        "num_queries": 50,
        "num_labels": 80,
    }


def lw_detr() -> tuple[nn.Module, type, Any, list[tuple[str, Any]]]:
    from libreyolo.models.lwdetr.nn import LibreLWDETRModel

    backbone = LwDetrViTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=12,
        window_block_indices=[0, 2, 4],
        out_indices=[2, 4, 6],
    )
    config = LwDetrConfig(
        backbone_config=backbone,
        num_queries=100,
        projector_scale_factors=[1.0],
        decoder_n_points=2,
        num_labels=91,
    )
    return LibreLWDETRModel("t", 91), LwDetrForObjectDetection, config, [*_LW_DETR, *_PROJECTOR]


def rf_detr() -> tuple[nn.Module, type, Any, list[tuple[str, Any]]]:
    from libreyolo.models.rfdetr.nn import LibreRFDETRModel

    backbone = RfDetrDinov2Config(
        image_size=384,
        patch_size=16,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        out_indices=[3, 6, 9, 12],
        num_windows=2,
    )
    config = RfDetrConfig(
        backbone_config=backbone,
        projector_scale_factors=[1.0],
        decoder_layers=2,
        decoder_n_points=2,
        num_labels=81,
    )
    return LibreRFDETRModel("n"), RfDetrForObjectDetection, config, [*_RF_DETR, *_PROJECTOR, _ONE]


def d_fine() -> tuple[nn.Module, type, Any, list[tuple[str, Any]]]:
    from libreyolo.models.dfine.nn import LibreDFINEModel

    backbone = HGNetV2Config(
        hidden_sizes=[64, 256, 512, 1024],
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 64, 256, 512],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=[64, 256, 512, 1024],
        stage_num_blocks=[1, 1, 2, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        stage_numb_of_layers=[3, 3, 3, 3],
        use_learnable_affine_block=True,
        out_features=["stage3", "stage4"],
    )
    config = DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=[512, 1024],
        feat_strides=[16, 32],
        encoder_hidden_dim=128,
        encoder_ffn_dim=512,
        hidden_expansion=0.34,
        depth_mult=0.5,
        encode_proj_layers=[1],
        decoder_in_channels=[128, 128],
        d_model=128,
        decoder_ffn_dim=512,
        num_feature_levels=2,
        decoder_layers=3,
        decoder_n_points=[6, 6],
        num_labels=80,
    )
    peer = LibreDFINEModel("n", 80, eval_spatial_size=None)
    return peer, DFineForObjectDetection, config, [*_HGNET, *_SHARED]


@pytest.mark.parametrize("family", [rt_detr, rt_detr_v2, d_fine, lw_detr, rf_detr])
def test_agrees_with_the_authors_code(
    tmp_path: Path, family: Callable[[], tuple[nn.Module, type, Any, list[tuple[str, Any]]]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        peer, kind, config, rules = family()
    enliven(peer)
    peer.eval()
    model: Any = kind(config).eval()
    weights = renamed(peer.state_dict(), rules)
    result = model.load_state_dict(weights, strict=False)
    assert result.unexpected_keys == []
    # Heads are listed twice; points per level are counted, not learned.
    computed = re.compile("^class_embed|^bbox_embed|num_batches_tracked|points_scale")
    assert [k for k in result.missing_keys if not computed.search(k)] == []
    model.tie_weights()
    model.save_pretrained(tmp_path)
    size = {"height": SIDE, "width": SIDE}
    RTDetrImageProcessor(size=size).save_pretrained(tmp_path)
    detector = load_detector("hf", str(tmp_path))
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = peer(pixels)
    found = detector.forward(pixels)
    ours = torch.cat([found.class_logits[0], found.boxes_cxcywh_norm[0]], 1)
    theirs = torch.cat([wanted["pred_logits"][0], wanted["pred_boxes"][0]], 1)
    # Proposals of equal score to seven digits may change places: each row meets its like.
    partner = torch.cdist(ours, theirs).argmin(1)
    assert len(partner.unique()) == len(ours)
    # Seen: 1e-5 in logits of spread 1 to 5, 1.2e-4 for RF-DETR's twelve windowed ViT layers.
    torch.testing.assert_close(ours, theirs[partner], atol=2e-4, rtol=0)
