"""Grounding DINO of IDEA-Research/GroundingDINO."""

from functools import partial
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.huggingface.families import FAMILIES
from mfdetr_cache.detectors.names import Marks, Rules, count
from mfdetr_cache.detectors.official.architecture import read_backbone
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.translated.blueprint import Blueprint
from mfdetr_cache.errors import DetectorError

# What its text is split with; the file has none.
_TOKENIZER = "google-bert/bert-base-uncased"
_VOCABULARY = "vocab.txt"
# Takes out_indices, which its signature does not say.
_SWIN_CONFIG: Any = SwinConfig
_HEADS = 8
_LAYERS = r"transformer\.{}\.layers\.(\d+)\."
# Integer tables, a layer of the text encoder behind what is read, and labels of its training.
_UNUSED = r"relative_position_index$|^bert\.(pooler|embeddings\.position_ids)|^label_enc\."

_SWIN: Rules = (
    *((rf"^backbone\.0\.norm{i}\.", f"B.hidden_states_norms.stage{i + 1}.") for i in range(4)),
    (r"^backbone\.0\.patch_embed\.proj\.", "B.swin.embeddings.patch_embeddings.projection."),
    (r"^backbone\.0\.patch_embed\.norm\.", "B.swin.embeddings.norm."),
    (r"^backbone\.0\.layers\.", "B.swin.encoder.layers."),
    (r"(blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (
        r"\.attn\.relative_position_bias_table$",
        ".attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"(blocks\.\d+)\.attn\.proj\.", r"\1.attention.o_proj."),
    (r"(blocks\.\d+)\.attn\.qkv\.", r"\1.attention.{q,k,v}_proj."),
    (r"^B\.", "model.backbone.conv_encoder.model."),
)
_RULES: Rules = (
    *_SWIN,
    (r"^bert\.", "model.text_backbone."),
    (r"^feat_map\.", "model.text_projection."),
    (r"^input_proj\.", "model.input_proj_vision."),
    (r"^transformer\.tgt_embed\.", "model.query_position_embeddings."),
    (r"^transformer\.enc_out_bbox_embed\.", "model.encoder_output_bbox_embed."),
    (r"^transformer\.encoder\.text_layers\.(\d)\.", r"T.encoder.layers.\1.text_enhancer_layer."),
    (r"^transformer\.encoder\.fusion_layers\.(\d)\.", r"T.encoder.layers.\1.fusion_layer."),
    (r"^transformer\.encoder\.layers\.(\d)\.", r"T.encoder.layers.\1.deformable_layer."),
    (r"(deformable_layer)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(deformable_layer)\.norm2\.", r"\1.final_layer_norm."),
    (r"(text_enhancer_layer)\.norm1\.", r"\1.layer_norm_before."),
    (r"(text_enhancer_layer)\.norm2\.", r"\1.layer_norm_after."),
    (r"\.gamma_v$", ".vision_param"),
    (r"\.gamma_l$", ".text_param"),
    (r"\.layer_norm_v\.", ".layer_norm_vision."),
    (r"\.layer_norm_l\.", ".layer_norm_text."),
    (r"(fusion_layer\.attn\.(?:values_|out_)?)v_proj\.", r"\1vision_proj."),
    (r"(fusion_layer\.attn\.(?:values_|out_)?)l_proj\.", r"\1text_proj."),
    (r"^transformer\.decoder\.norm\.", "T.decoder.layer_norm."),
    (r"^transformer\.decoder\.ref_point_head\.", "T.decoder.reference_points_head."),
    (r"^transformer\.", "T."),
    (r"(decoder\.layers\.\d)\.cross_attn\.", r"\1.encoder_attn."),
    (r"(decoder\.layers\.\d)\.norm1\.", r"\1.encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d)\.norm2\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d)\.norm3\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d)\.ca_text\.", r"\1.encoder_attn_text."),
    (r"(decoder\.layers\.\d)\.catext_norm\.", r"\1.encoder_attn_text_layer_norm."),
    (r"(^T\..*layers\.\d.*)\.linear([12])\.", r"\1.fc\2."),
    # All layers have one box head, which the file lists again for each of them.
    (r"^(?:T\.decoder\.)?bbox_embed\.\d\.", "T.decoder.bbox_embed.0."),
    (r"\.in_proj_(weight|bias)$", r".{query,key,value}.\1"),
    (r"^T\.", "model."),
)


# Layers where picture and text meet.
is_grounding_dino = Marks(
    ("transformer.encoder.fusion_layers.0.gamma_v", "bert.embeddings.word_embeddings.weight")
)


def read_grounding_dino(checkpoint: Checkpoint, _options: DetectorOptions) -> Blueprint:
    """Blueprint of a Grounding DINO checkpoint, Swin-T or Swin-B."""
    tensors = checkpoint.tensors
    swin = read_backbone(tensors)
    encoder = "transformer.encoder.layers.0"
    levels = tensors["transformer.level_embed"].shape[0]
    samples = tensors[f"{encoder}.self_attn.attention_weights.bias"].shape[0]
    config = GroundingDinoConfig(
        backbone_config=_SWIN_CONFIG(
            embed_dim=swin.width,
            depths=list(swin.depths),
            num_heads=list(swin.heads),
            window_size=swin.window,
            image_size=32 * swin.window,
            out_indices=[i + 1 for i in range(swin.first_stage, len(swin.depths))],
        ),
        num_queries=tensors["transformer.tgt_embed.weight"].shape[0],
        num_feature_levels=levels,
        encoder_layers=count(tensors, _LAYERS.format("encoder")),
        decoder_layers=count(tensors, _LAYERS.format("decoder")),
        encoder_ffn_dim=tensors[f"{encoder}.linear1.bias"].shape[0],
        decoder_ffn_dim=tensors["transformer.decoder.layers.0.linear1.bias"].shape[0],
        encoder_n_points=samples // (_HEADS * levels),
        decoder_n_points=samples // (_HEADS * levels),
    )
    return Blueprint(
        family=FAMILIES["grounding-dino"],
        build=partial(_build, config),
        rules=_RULES,
        tensors=tensors,
        input_hw=None,
        normalise=True,
        unused=_UNUSED,
    )


def text_splitter(weights: Path) -> Any:  # noqa: ANN401  transformers has no type for it
    """The tokenizer: of the vocabulary beside a checkpoint, else of the hub, else DetectorError."""
    beside = weights.parent / _VOCABULARY
    source = str(weights.parent) if beside.is_file() else _TOKENIZER
    try:
        if beside.is_file():
            return transformers.BertTokenizer(str(beside))
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DetectorError(
            f"{weights} comes without the vocabulary of its text, and {_TOKENIZER} cannot be had "
            f"from the hub: put that one's {_VOCABULARY} beside the checkpoint"
        ) from error


def _build(config: GroundingDinoConfig) -> Any:  # noqa: ANN401
    model: Any = GroundingDinoForObjectDetection(config)
    # A norm behind the whole Swin, whose output nobody reads.
    model.model.backbone.conv_encoder.model.swin.layernorm = nn.Identity()
    # transformers shares the parameters of several heads, which loading would part.
    heads = nn.ModuleList([model.bbox_embed[0]] * len(model.bbox_embed))
    model.bbox_embed = model.model.decoder.bbox_embed = heads
    return model
