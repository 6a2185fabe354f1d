"""Convolutional backbones of RT-DETR, D-FINE and DEIM, inferred from a checkpoint."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import HGNetV2Config, RTDetrResNetConfig

from mfdetr_cache.detectors.names import Rules, count

RESNET_RULES: Rules = (
    (r"^backbone\.conv1\.conv1_1\.", "backbone.embedder.embedder.0."),
    (r"^backbone\.conv1\.conv1_2\.", "backbone.embedder.embedder.1."),
    (r"^backbone\.conv1\.conv1_3\.", "backbone.embedder.embedder.2."),
    (r"^backbone\.res_layers\.(\d)\.blocks\.", r"backbone.encoder.stages.\1.layers."),
    (r"^(backbone\..*)\.branch2a\.", r"\1.layer.0."),
    (r"^(backbone\..*)\.branch2b\.", r"\1.layer.1."),
    (r"^(backbone\..*)\.branch2c\.", r"\1.layer.2."),
    # A stride is an average pooling before the convolution, which is then the second module.
    (r"^(backbone\..*)\.short\.conv\.(conv|norm)\.", r"\1.shortcut.1.\2."),
    (r"^(backbone\..*)\.short\.", r"\1.shortcut."),
    (r"^(backbone\..*)\.conv\.weight$", r"\1.convolution.weight"),
    (r"^(backbone\..*)\.norm\.", r"\1.normalization."),
)
HGNET_RULES: Rules = (
    (r"^backbone\.stem\.", "backbone.embedder."),
    (r"^backbone\.stages\.", "backbone.encoder.stages."),
    (r"\.aggregation_squeeze_conv\.", ".aggregation.0."),
    (r"\.aggregation_excitation_conv\.", ".aggregation.1."),
    (r"^(backbone\..*)\.conv(\.1)?\.weight$", r"\1.convolution.weight"),
    (r"^(backbone\..*)\.bn\.", r"\1.normalization."),
)


def backbone_rules(tensors: Mapping[str, Tensor], place: str) -> Rules:
    """Renaming rules of a checkpoint's backbone; ``place`` is its module path in the model."""
    own = RESNET_RULES if "backbone.conv1.conv1_1.conv.weight" in tensors else HGNET_RULES
    return (*own, (r"^backbone\.", f"{place}."))


def read_backbone(
    tensors: Mapping[str, Tensor], num_outputs: int
) -> tuple[RTDetrResNetConfig | HGNetV2Config, list[int]]:
    """Configuration of a checkpoint's backbone; channels of its last ``num_outputs`` stages."""
    if "backbone.stem.stem1.conv.weight" in tensors:
        config = _read_hgnet(tensors, num_outputs)
        return config, list(config.stage_out_channels)[-num_outputs:]
    resnet = _read_resnet(tensors, num_outputs)
    return resnet, list(resnet.hidden_sizes)[-num_outputs:]


def _last_stages(num_stages: int, num_outputs: int) -> dict[str, Any]:
    return {"out_features": [f"stage{i + 1}" for i in range(num_stages - num_outputs, num_stages)]}


def _read_resnet(tensors: Mapping[str, Tensor], num_outputs: int) -> RTDetrResNetConfig:
    """ResNet-vd: three convolutions as a stem, and average pooling in the shortcuts."""
    bottleneck = "backbone.res_layers.0.blocks.0.branch2c.conv.weight" in tensors
    last = "branch2c" if bottleneck else "branch2b"
    stages = count(tensors, r"backbone\.res_layers\.(\d+)\.")
    return RTDetrResNetConfig(
        embedding_size=tensors["backbone.conv1.conv1_3.conv.weight"].shape[0],
        hidden_sizes=[
            tensors[f"backbone.res_layers.{i}.blocks.0.{last}.conv.weight"].shape[0]
            for i in range(stages)
        ],
        depths=[
            count(tensors, rf"backbone\.res_layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)
        ],
        layer_type="bottleneck" if bottleneck else "basic",
        **_last_stages(stages, num_outputs),
    )


def _read_hgnet(tensors: Mapping[str, Tensor], num_outputs: int) -> HGNetV2Config:
    stages = count(tensors, r"backbone\.stages\.(\d+)\.")
    read = [_read_hgnet_stage(tensors, i) for i in range(stages)]
    stem = "backbone.stem"
    stem_out = tensors[f"{stem}.stem4.conv.weight"].shape[0]
    return HGNetV2Config(
        embedding_size=stem_out,
        depths=[s["blocks"] for s in read],
        hidden_sizes=[s["out"] for s in read],
        stem_channels=[3, tensors[f"{stem}.stem1.conv.weight"].shape[0], stem_out],
        stage_in_channels=[s["in"] for s in read],
        stage_mid_channels=[s["mid"] for s in read],
        stage_out_channels=[s["out"] for s in read],
        stage_num_blocks=[s["blocks"] for s in read],
        stage_downsample=[bool(s["downsample"]) for s in read],
        stage_downsample_strides=[2] * stages,
        stage_light_block=[bool(s["light"]) for s in read],
        stage_kernel_size=[s["kernel"] for s in read],
        stage_numb_of_layers=[s["layers"] for s in read],
        use_learnable_affine_block=f"{stem}.stem1.lab.scale" in tensors,
        **_last_stages(stages, num_outputs),
    )


def _read_hgnet_stage(tensors: Mapping[str, Tensor], index: int) -> dict[str, int]:
    stage = f"backbone.stages.{index}"
    block = f"{stage}.blocks.0"
    layers = count(tensors, re.escape(block) + r"\.layers\.(\d+)\.")
    light = f"{block}.layers.0.conv2.conv.weight" in tensors
    weight = tensors[f"{block}.layers.0.{'conv2.' if light else ''}conv.weight"]
    squeeze = tensors.get(f"{block}.aggregation.0.conv.weight")
    if squeeze is None:
        squeeze = tensors[f"{block}.aggregation_squeeze_conv.conv.weight"]
    middle = int(weight.shape[0])
    return {
        "blocks": count(tensors, re.escape(stage) + r"\.blocks\.(\d+)\."),
        "layers": layers,
        "light": light,
        "mid": middle,
        "kernel": int(weight.shape[-1]),
        "in": int(squeeze.shape[1]) - layers * middle,
        "out": 2 * int(squeeze.shape[0]),
        "downsample": f"{stage}.downsample.conv.weight" in tensors,
    }
