"""Small detectors with random weights, saved as a user would have them on disk."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DabDetrConfig,
    DabDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    Deimv2Config,
    Deimv2ForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    DFineConfig,
    DFineForObjectDetection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    HGNetV2Config,
    LwDetrConfig,
    LwDetrForObjectDetection,
    LwDetrViTConfig,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    ResNetConfig,
    RfDetrConfig,
    RfDetrForObjectDetection,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    SwinConfig,
)
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

LABELS = {0: "ellipse", 1: "box", 2: "other"}
_LABELLED: dict[str, Any] = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
_TRANSFORMER: dict[str, Any] = {
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_queries": 20,
}
# Of detectors that keep the shape of an image.
_FITTED = {"shortest_edge": 96, "longest_edge": 160}


def _fixed_processor(side: int) -> RTDetrImageProcessor:
    return RTDetrImageProcessor(size={"height": side, "width": side}, do_normalize=False)


def _enliven(model: torch.nn.Module) -> None:
    """Give a fresh model signals of a trained one's size.

    transformers starts convolutions so small that maps deep inside are of order 1e-8, and class
    heads with all scores alike.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                fan_in = module.weight[0].numel()
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(noise * (2 / fan_in) ** 0.5)
        for name, parameter in model.named_parameters():
            if "class_embed" in name or "score_head" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.3 * noise)
            elif "bbox" in name and "weight" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


# Four stages of one narrow block each.
_STAGES = {
    "embedding_size": 16,
    "hidden_sizes": [16, 24, 32, 40],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_FROM_STRIDE_8 = ["stage2", "stage3", "stage4"]


def _save(model: Any, folder: Path, processor: Any) -> None:
    _enliven(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _save_hybrid(
    folder: Path, config_class: Any, model_class: Any, backbone: Any, seed: int = 0, **more: Any
) -> None:
    """RT-DETR and its descendants: three levels from stride 8."""
    torch.manual_seed(seed)
    config = config_class(
        backbone_config=backbone,
        encoder_in_channels=[24, 32, 40],
        decoder_in_channels=[32, 32, 32],
        d_model=32,
        encoder_hidden_dim=32,
        num_denoising=0,
        **more,
        **_TRANSFORMER,
        **_LABELLED,
    )
    _save(model_class(config), folder, _fixed_processor(96))


def save_rtdetr(folder: Path, seed: int = 0) -> None:
    backbone = RTDetrResNetConfig(**_STAGES, out_features=_FROM_STRIDE_8)
    _save_hybrid(folder, RTDetrConfig, RTDetrForObjectDetection, backbone, seed)


def save_rtdetr_v2(folder: Path) -> None:
    backbone = RTDetrResNetConfig(**_STAGES, out_features=_FROM_STRIDE_8)
    _save_hybrid(folder, RTDetrV2Config, RTDetrV2ForObjectDetection, backbone)


def _hgnet() -> HGNetV2Config:
    return HGNetV2Config(
        embedding_size=8,
        stem_channels=[3, 8, 8],
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        stage_in_channels=[8, 16, 24, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 24, 32, 40],
        stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=_FROM_STRIDE_8,
    )


def save_dfine(folder: Path) -> None:
    _save_hybrid(folder, DFineConfig, DFineForObjectDetection, _hgnet(), feat_strides=[8, 16, 32])


def save_deimv2(folder: Path) -> None:
    _save_hybrid(folder, Deimv2Config, Deimv2ForObjectDetection, _hgnet(), feat_strides=[8, 16, 32])


def _save_single_level(folder: Path, config_class: Any, model_class: Any) -> None:
    """DETR and its nearest descendants: one level at stride 32."""
    torch.manual_seed(0)
    width = "hidden_size" if config_class is DabDetrConfig else "d_model"
    config = config_class(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(**_STAGES, out_features=["stage1", *_FROM_STRIDE_8]),
        encoder_layers=5,
        **{width: 32},
        **_TRANSFORMER,
        **_LABELLED,
    )
    _save(model_class(config), folder, DetrImageProcessor(size=_FITTED))


def save_detr(folder: Path) -> None:
    _save_single_level(folder, DetrConfig, DetrForObjectDetection)


def save_conditional_detr(folder: Path) -> None:
    _save_single_level(folder, ConditionalDetrConfig, ConditionalDetrForObjectDetection)


def save_dab_detr(folder: Path) -> None:
    _save_single_level(folder, DabDetrConfig, DabDetrForObjectDetection)


def save_lw_detr(folder: Path) -> None:
    backbone = LwDetrViTConfig(
        image_size=96,
        pretrain_image_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        window_block_indices=[0],
        out_indices=[0, 1],
        num_windows=4,
    )
    _save_plain_vit(folder, backbone, LwDetrConfig, LwDetrForObjectDetection, 96)


def save_rf_detr(folder: Path, patch: int = 16, side: int = 96) -> None:
    backbone = RfDetrDinov2Config(
        image_size=side,
        patch_size=patch,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        out_indices=[1, 2],
        num_windows=1,
    )
    _save_plain_vit(folder, backbone, RfDetrConfig, RfDetrForObjectDetection, side)


def _save_plain_vit(
    folder: Path, backbone: Any, config_class: Any, model_class: Any, side: int
) -> None:
    torch.manual_seed(0)
    config = config_class(
        backbone_config=backbone,
        projector_scale_factors=[1.0],
        d_model=32,
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        num_queries=20,
        group_detr=1,
        **_LABELLED,
    )
    _save(model_class(config), folder, _fixed_processor(side))


def save_deformable_detr(folder: Path, *, two_stage: bool = False) -> None:
    torch.manual_seed(0)
    config = DeformableDetrConfig(
        backbone_config=ResNetConfig(**_STAGES, out_features=_FROM_STRIDE_8),
        use_timm_backbone=False,
        d_model=32,
        encoder_layers=5,
        two_stage_num_proposals=20,
        two_stage=two_stage,
        with_box_refine=two_stage,
        **_TRANSFORMER,
        **_LABELLED,
    )
    processor = DeformableDetrImageProcessor(size=_FITTED)
    _save(DeformableDetrForObjectDetection(config), folder, processor)


# BERT's tokens that Grounding DINO knows by their numbers, among words of these tests.
_TOKENS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}
_WORDS = ("ellipse", "box", "other", "crowd", "traffic", "light", "elephant", "tiger", "##s")


def save_grounding_dino(folder: Path, *, mm: bool = False) -> None:
    """Also the vocabulary of a small BERT."""
    torch.manual_seed(0)
    names = _TOKENS | dict(enumerate(_WORDS, 200))
    vocabulary = {names.get(i, f"[unused{i}]"): i for i in range(1030)}
    settings: dict[str, Any] = {
        "backbone_config": SwinConfig(
            image_size=96,
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_indices=[2, 3, 4],
        ),
        "text_config": BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        "d_model": 32,
        "encoder_layers": 2,
        **_TRANSFORMER,
    }
    config = (MMGroundingDinoConfig if mm else GroundingDinoConfig)(**settings)
    kind = MMGroundingDinoForObjectDetection if mm else GroundingDinoForObjectDetection
    _save(kind(config), folder, GroundingDinoImageProcessor(size=_FITTED))
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
