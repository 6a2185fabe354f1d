"""Segment Anything models with random weights, small enough to run in a test."""

from pathlib import Path
from typing import Any, Literal

import torch
import transformers

_DECODER = {
    "hidden_size": 16,
    "mlp_dim": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 16,
}
_PROMPTS = {"hidden_size": 16, "image_size": 64, "patch_size": 16}
_VIT = {
    "hidden_size": 16,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "mlp_dim": 16,
    "global_attn_indexes": [0, 1],
    "num_pos_feats": 8,
}
_HIERA = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [64, 64],
        "num_attention_heads": 1,
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [4, 4],
    },
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "fpn_hidden_size": 16,
}


def save_sam(kind: Literal["sam", "sam_hq", "sam2"], folder: Path) -> None:
    """Write a model and its processor, as from_pretrained reads them."""
    vision, decoder = (_HIERA if kind == "sam2" else _VIT), dict(_DECODER)
    if kind == "sam_hq":
        decoder["vit_dim"] = 16
    name = {"sam": "Sam", "sam_hq": "SamHQ", "sam2": "Sam2"}[kind]
    parts: dict[str, Any] = {
        "vision_config": vision,
        "prompt_encoder_config": _PROMPTS,
        "mask_decoder_config": decoder,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**parts)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    square = {"height": 64, "width": 64}
    images = (
        transformers.Sam2ImageProcessor(size=square, mask_size={"height": 16, "width": 16})
        if kind == "sam2"
        else transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size=square)
    )
    getattr(transformers, f"{name}Processor")(images).save_pretrained(folder)
