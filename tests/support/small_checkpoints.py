"""Small checkpoints in the authors' layouts, written down name by name and filled at random."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.authors import anchors
from tests.support.ultralytics import ultralytics_weights

LABELS = ("ellipse", "box", "other")
_WIDTH = 32
_CLASSES = len(LABELS)


class Layout:
    """Names and tensors of a state dict."""

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(seed)

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> None:
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
        values = torch.randn(shape, generator=self._random)
        self.tensors[name] = values * scale * (2 / fan_in) ** 0.5

    def vector(self, name: str, size: int, mean: float = 0.0) -> None:
        self.tensors[name] = mean + 0.05 * torch.randn(size, generator=self._random)

    def linear(self, name: str, out: int, width: int, scale: float = 1.0) -> None:
        self.weight(f"{name}.weight", out, width, scale=scale)
        self.vector(f"{name}.bias", out)

    def mlp(self, name: str, *widths: int) -> None:
        for i, (width, out) in enumerate(pairwise(widths)):
            self.linear(f"{name}.layers.{i}", out, width, 0.3 if out in (1, 4, 132) else 1.0)

    def norm(self, name: str, size: int) -> None:
        self.vector(f"{name}.weight", size, 1.0)
        self.vector(f"{name}.bias", size)

    def batch_norm(self, name: str, size: int) -> None:
        self.norm(name, size)
        self.vector(f"{name}.running_mean", size)
        self.tensors[f"{name}.running_var"] = torch.ones(size)
        self.tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def conv(self, name: str, out: int, width: int, kernel: int = 1, norm: str = "norm") -> None:
        self.weight(f"{name}.conv.weight", out, width, kernel, kernel)
        self.batch_norm(f"{name}.{norm}", out)

    def attention(self, name: str, width: int) -> None:
        self.weight(f"{name}.in_proj_weight", 3 * width, width)
        self.vector(f"{name}.in_proj_bias", 3 * width)
        self.linear(f"{name}.out_proj", width, width)

    def sampling(self, name: str, width: int, samples: int, *, projected: bool) -> None:
        self.linear(f"{name}.sampling_offsets", 2 * samples, width)
        self.linear(f"{name}.attention_weights", samples, width)
        if projected:
            self.linear(f"{name}.value_proj", width, width)
            self.linear(f"{name}.output_proj", width, width)


def _resnet(layout: Layout) -> None:
    for i, (width, out) in enumerate(((3, 8), (8, 8), (8, 16))):
        layout.conv(f"backbone.conv1.conv1_{i + 1}", out, width, 3)
    widths = (16, 16, 24, 32, 40)
    for i, (width, out) in enumerate(pairwise(widths)):
        block = f"backbone.res_layers.{i}.blocks.0"
        layout.conv(f"{block}.short" + (".conv" if i else ""), out, width)
        layout.conv(f"{block}.branch2a", out, width, 3)
        layout.conv(f"{block}.branch2b", out, out, 3)


def _hgnet(layout: Layout, stages: int = 4) -> None:
    def affine(name: str) -> None:
        layout.vector(f"{name}.lab.scale", 1, 1.0)
        layout.vector(f"{name}.lab.bias", 1)

    stem = {"1": (8, 3, 3), "2a": (4, 8, 2), "2b": (8, 4, 2), "3": (8, 16, 3), "4": (8, 8, 1)}
    for part, (out, width, kernel) in stem.items():
        layout.conv(f"backbone.stem.stem{part}", out, width, kernel, "bn")
        affine(f"backbone.stem.stem{part}")
    widths = (8, 16, 24, 32, 40)[: stages + 1]
    for i, (width, out) in enumerate(pairwise(widths)):
        stage = f"backbone.stages.{i}"
        if i:
            layout.weight(f"{stage}.downsample.conv.weight", width, 1, 3, 3)
            layout.batch_norm(f"{stage}.downsample.bn", width)
        layer = f"{stage}.blocks.0.layers.0"
        if i >= 2:
            layout.conv(f"{layer}.conv1", 8, width, 1, "bn")
            layout.weight(f"{layer}.conv2.conv.weight", 8, 1, 5, 5)
            layout.batch_norm(f"{layer}.conv2.bn", 8)
            affine(f"{layer}.conv2")
        else:
            layout.conv(layer, 8, width, 3, "bn")
            affine(layer)
        for j, (o, w) in enumerate(((out // 2, width + 8), (out, out // 2))):
            layout.conv(f"{stage}.blocks.0.aggregation.{j}", o, w, 1, "bn")
            affine(f"{stage}.blocks.0.aggregation.{j}")


def _intra(layout: Layout) -> None:
    layer = "encoder.encoder.0.layers.0"
    layout.attention(f"{layer}.self_attn", _WIDTH)
    layout.linear(f"{layer}.linear1", 48, _WIDTH)
    layout.linear(f"{layer}.linear2", _WIDTH, 48)
    layout.norm(f"{layer}.norm1", _WIDTH)
    layout.norm(f"{layer}.norm2", _WIDTH)


def _heads(layout: Layout, layers: int, distances: int, query_pos: tuple[int, ...]) -> None:
    layout.linear("decoder.enc_score_head", _CLASSES, _WIDTH)
    layout.mlp("decoder.enc_bbox_head", _WIDTH, _WIDTH, _WIDTH, 4)
    layout.mlp("decoder.query_pos_head", *query_pos)
    for i in range(layers):
        layout.linear(f"decoder.dec_score_head.{i}", _CLASSES, _WIDTH)
        layout.mlp(f"decoder.dec_bbox_head.{i}", _WIDTH, _WIDTH, _WIDTH, distances)
    layout.weight("decoder.denoising_class_embed.weight", _CLASSES + 1, _WIDTH)


def rt_detr(layout: Layout, *, second: bool = False) -> None:
    _resnet(layout)
    for i, width in enumerate((24, 32, 40)):
        if second:
            layout.conv(f"encoder.input_proj.{i}", _WIDTH, width)
        else:
            layout.weight(f"encoder.input_proj.{i}.0.weight", _WIDTH, width, 1, 1)
            layout.batch_norm(f"encoder.input_proj.{i}.1", _WIDTH)
        layout.conv(f"decoder.input_proj.{i}", _WIDTH, _WIDTH)
    _intra(layout)
    for i in range(2):
        layout.conv(f"encoder.lateral_convs.{i}", _WIDTH, _WIDTH)
        layout.conv(f"encoder.downsample_convs.{i}", _WIDTH, _WIDTH, 3)
        for block in (f"encoder.fpn_blocks.{i}", f"encoder.pan_blocks.{i}"):
            layout.conv(f"{block}.conv1", 16, 2 * _WIDTH)
            layout.conv(f"{block}.conv2", 16, 2 * _WIDTH)
            for j in range(3):
                layout.conv(f"{block}.bottlenecks.{j}.conv1", 16, 16, 3)
                layout.conv(f"{block}.bottlenecks.{j}.conv2", 16, 16)
            layout.conv(f"{block}.conv3", _WIDTH, 16)
    for i in range(2):
        layer = f"decoder.decoder.layers.{i}"
        layout.attention(f"{layer}.self_attn", _WIDTH)
        layout.sampling(f"{layer}.cross_attn", _WIDTH, 8 * 3 * 2, projected=True)
        if second:
            layout.tensors[f"{layer}.cross_attn.num_points_scale"] = torch.full((6,), 0.5)
        layout.linear(f"{layer}.linear1", 48, _WIDTH)
        layout.linear(f"{layer}.linear2", _WIDTH, 48)
        for j in (1, 2, 3):
            layout.norm(f"{layer}.norm{j}", _WIDTH)
    names = ("proj", "norm") if second else ("0", "1")
    layout.linear(f"decoder.enc_output.{names[0]}", _WIDTH, _WIDTH)
    layout.norm(f"decoder.enc_output.{names[1]}", _WIDTH)
    _heads(layout, 2, 4, (4, 2 * _WIDTH, _WIDTH))
    if second:
        layout.tensors["decoder.anchors"] = anchors((160, 192), 20 * 24 + 10 * 12 + 5 * 6)


def rt_detr_v2(layout: Layout) -> None:
    rt_detr(layout, second=True)


def _distribution_decoder(layout: Layout, samples: list[int]) -> None:
    for name, value in (("up", 0.5), ("reg_scale", 4)):
        for place in ("decoder", "decoder.decoder"):
            layout.tensors[f"{place}.{name}"] = torch.tensor([value])
    layout.mlp("decoder.pre_bbox_head", _WIDTH, _WIDTH, _WIDTH, 4)
    for i in range(2):
        layer = f"decoder.decoder.layers.{i}"
        layout.attention(f"{layer}.self_attn", _WIDTH)
        layout.sampling(f"{layer}.cross_attn", _WIDTH, 8 * sum(samples), projected=False)
        scale = [1 / n for n in samples for _ in range(n)]
        layout.tensors[f"{layer}.cross_attn.num_points_scale"] = torch.tensor(scale)
        layout.mlp(f"decoder.decoder.lqe_layers.{i}.reg_conf", 20, 16, 1)


def d_fine(layout: Layout) -> None:
    _hgnet(layout)
    for i, width in enumerate((24, 32, 40)):
        layout.conv(f"encoder.input_proj.{i}", _WIDTH, width)
    _intra(layout)
    for i in range(2):
        layout.conv(f"encoder.lateral_convs.{i}", _WIDTH, _WIDTH)
        layout.conv(f"encoder.downsample_convs.{i}.0.cv1", _WIDTH, _WIDTH)
        layout.weight(f"encoder.downsample_convs.{i}.0.cv2.conv.weight", _WIDTH, 1, 3, 3)
        layout.batch_norm(f"encoder.downsample_convs.{i}.0.cv2.norm", _WIDTH)
        for block in (f"encoder.fpn_blocks.{i}", f"encoder.pan_blocks.{i}"):
            layout.conv(f"{block}.cv1", 2 * _WIDTH, 2 * _WIDTH)
            for part, width in (("cv2", _WIDTH), ("cv3", 10)):
                layout.conv(f"{block}.{part}.0.conv1", 10, width)
                layout.conv(f"{block}.{part}.0.conv2", 10, width)
                layout.conv(f"{block}.{part}.0.bottlenecks.0.conv1", 10, 10, 3)
                layout.conv(f"{block}.{part}.0.bottlenecks.0.conv2", 10, 10)
                layout.conv(f"{block}.{part}.1", 10, 10, 3)
            layout.conv(f"{block}.cv4", _WIDTH, 2 * _WIDTH + 20)
    _distribution_decoder(layout, [3, 6, 3])
    for i in range(2):
        layer = f"decoder.decoder.layers.{i}"
        layout.norm(f"{layer}.norm1", _WIDTH)
        layout.norm(f"{layer}.norm3", _WIDTH)
        layout.linear(f"{layer}.gateway.gate", 2 * _WIDTH, 2 * _WIDTH)
        layout.norm(f"{layer}.gateway.norm", _WIDTH)
        layout.linear(f"{layer}.linear1", 48, _WIDTH)
        layout.linear(f"{layer}.linear2", _WIDTH, 48)
    layout.linear("decoder.enc_output.proj", _WIDTH, _WIDTH)
    layout.norm("decoder.enc_output.norm", _WIDTH)
    _heads(layout, 2, 132, (4, 2 * _WIDTH, _WIDTH))
    layout.tensors["decoder.anchors"] = anchors((160, 160), 525)


def deimv2(layout: Layout) -> None:
    _hgnet(layout, stages=3)
    layout.conv("encoder.input_proj.0", _WIDTH, 32)
    for part in ("down_sample1", "down_sample2"):
        layout.weight(f"encoder.{part}.1.weight", _WIDTH, _WIDTH, 1, 1)
        layout.batch_norm(f"encoder.{part}.2", _WIDTH)
    layout.conv("encoder.bi_fusion.cv", _WIDTH, _WIDTH)
    for block in ("encoder.fpn_block", "encoder.pan_block"):
        layout.conv(f"{block}.cv1", 2 * _WIDTH, _WIDTH)
        for part, width in (("cv2", _WIDTH), ("cv3", 10)):
            layout.conv(f"{block}.{part}.0.conv1", 20, width)
            layout.conv(f"{block}.{part}.0.bottlenecks.0.conv1", 10, 10, 3)
            layout.conv(f"{block}.{part}.0.bottlenecks.0.conv2", 10, 10)
            layout.conv(f"{block}.{part}.1", 10, 10, 3)
        layout.conv(f"{block}.cv4", _WIDTH, 2 * _WIDTH + 20)
    _distribution_decoder(layout, [4, 2])
    for i in range(2):
        layer = f"decoder.decoder.layers.{i}"
        for j in (1, 2, 3):
            layout.vector(f"{layer}.norm{j}.scale", _WIDTH, 1.0)
        layout.linear(f"{layer}.swish_ffn.w12", 48, _WIDTH)
        layout.linear(f"{layer}.swish_ffn.w3", _WIDTH, 24)
    _heads(layout, 2, 132, (4, _WIDTH, _WIDTH, _WIDTH))
    for name in [n for n in layout.tensors if n.startswith("decoder.dec_bbox_head.1.")]:
        layout.tensors[name] = layout.tensors[name.replace("head.1.", "head.0.")].clone()
    layout.tensors["decoder.anchors"] = anchors((320, 320), 500)


def _grouped_decoder(layout: Layout, *, channel_norms: bool, maps: int) -> None:
    groups, queries = 3, 20
    norm = layout.norm if channel_norms else layout.batch_norm
    block = "backbone.0.projector.stages.0.0"
    for part, out, width, kernel in (
        ("cv1", _WIDTH, maps * 48, 1),
        ("cv2", _WIDTH, 5 * 16, 1),
        *((f"m.{i}.cv{j}", 16, 16, 3) for i in range(3) for j in (1, 2)),
    ):
        layout.weight(f"{block}.{part}.conv.weight", out, width, kernel, kernel)
        norm(f"{block}.{part}.bn", out)
    layout.norm("backbone.0.projector.stages.0.1", _WIDTH)
    for i in range(2):
        layer = f"transformer.decoder.layers.{i}"
        layout.attention(f"{layer}.self_attn", _WIDTH)
        layout.sampling(f"{layer}.cross_attn", _WIDTH, 2 * 1 * 2, projected=True)
        layout.linear(f"{layer}.linear1", 48, _WIDTH)
        layout.linear(f"{layer}.linear2", _WIDTH, 48)
        for j in (1, 2, 3):
            layout.norm(f"{layer}.norm{j}", _WIDTH)
    layout.norm("transformer.decoder.norm", _WIDTH)
    layout.mlp("transformer.decoder.ref_point_head", 2 * _WIDTH, _WIDTH, _WIDTH)
    for i in range(groups):
        layout.linear(f"transformer.enc_output.{i}", _WIDTH, _WIDTH)
        layout.norm(f"transformer.enc_output_norm.{i}", _WIDTH)
        layout.mlp(f"transformer.enc_out_bbox_embed.{i}", _WIDTH, _WIDTH, _WIDTH, 4)
        layout.linear(f"transformer.enc_out_class_embed.{i}", _CLASSES, _WIDTH)
    layout.linear("class_embed", _CLASSES, _WIDTH)
    layout.mlp("bbox_embed", _WIDTH, _WIDTH, _WIDTH, 4)
    # Boxes relative to their proposals: small steps, so that they stay in the image.
    for name in [n for n in layout.tensors if "bbox_embed" in n and ".layers.2." in n]:
        layout.tensors[name] *= 0.05
    layout.tensors["refpoint_embed.weight"] = torch.zeros(groups * queries, 4)
    layout.weight("query_feat.weight", groups * queries, _WIDTH)


def lw_detr(layout: Layout) -> None:
    vit = "backbone.0.encoder"
    layout.weight(f"{vit}.pos_embed", 1, 1 + 14 * 14, 48)
    layout.weight(f"{vit}.patch_embed.proj.weight", 48, 3, 16, 16)
    layout.vector(f"{vit}.patch_embed.proj.bias", 48)
    for i in range(6):
        block = f"{vit}.blocks.{i}"
        layout.vector(f"{block}.gamma_1", 48, 0.5)
        layout.vector(f"{block}.gamma_2", 48, 0.5)
        layout.norm(f"{block}.norm1", 48)
        layout.norm(f"{block}.norm2", 48)
        layout.vector(f"{block}.attn.q_bias", 48)
        layout.vector(f"{block}.attn.v_bias", 48)
        layout.weight(f"{block}.attn.qkv.weight", 144, 48)
        layout.linear(f"{block}.attn.proj", 48, 48)
        layout.linear(f"{block}.mlp.fc1", 192, 48)
        layout.linear(f"{block}.mlp.fc2", 48, 192)
    _grouped_decoder(layout, channel_norms=False, maps=3)


def rf_detr(layout: Layout) -> None:
    """The segmentation form."""
    embeddings = "backbone.0.encoder.encoder.embeddings"
    layout.weight(f"{embeddings}.cls_token", 1, 1, 64)
    layout.weight(f"{embeddings}.mask_token", 1, 64)
    layout.weight(f"{embeddings}.position_embeddings", 1, 1 + 12 * 12, 64)
    layout.weight(f"{embeddings}.patch_embeddings.projection.weight", 64, 3, 16, 16)
    layout.vector(f"{embeddings}.patch_embeddings.projection.bias", 64)
    for i in range(12):
        block = f"backbone.0.encoder.encoder.encoder.layer.{i}"
        layout.norm(f"{block}.norm1", 64)
        layout.norm(f"{block}.norm2", 64)
        for part in ("query", "key", "value"):
            layout.linear(f"{block}.attention.attention.{part}", 64, 64)
        layout.linear(f"{block}.attention.output.dense", 64, 64)
        layout.vector(f"{block}.layer_scale1.lambda1", 64, 0.5)
        layout.vector(f"{block}.layer_scale2.lambda1", 64, 0.5)
        layout.linear(f"{block}.mlp.fc1", 256, 64)
        layout.linear(f"{block}.mlp.fc2", 64, 256)
    layout.norm("backbone.0.encoder.encoder.layernorm", 64)
    _grouped_decoder(layout, channel_norms=True, maps=4)
    block = "backbone.0.projector.stages.0.0.cv1.conv.weight"
    layout.weight(block, _WIDTH, 4 * 64, 1, 1)
    branch = "segmentation_head"
    for i in range(2):
        layout.weight(f"{branch}.blocks.{i}.dwconv.weight", _WIDTH, 1, 3, 3)
        layout.vector(f"{branch}.blocks.{i}.dwconv.bias", _WIDTH)
        layout.norm(f"{branch}.blocks.{i}.norm", _WIDTH)
        layout.linear(f"{branch}.blocks.{i}.pwconv1", _WIDTH, _WIDTH)
    layout.weight(f"{branch}.spatial_features_proj.weight", _WIDTH, _WIDTH, 1, 1)
    layout.vector(f"{branch}.spatial_features_proj.bias", _WIDTH)
    layout.norm(f"{branch}.query_features_block.norm_in", _WIDTH)
    layout.linear(f"{branch}.query_features_block.layers.0", 4 * _WIDTH, _WIDTH)
    layout.linear(f"{branch}.query_features_block.layers.2", _WIDTH, 4 * _WIDTH)
    layout.linear(f"{branch}.query_features_proj", _WIDTH, _WIDTH)
    layout.vector(f"{branch}.bias", 1)


def ultralytics(layout: Layout) -> None:
    layout.tensors |= ultralytics_weights()


SMALL: dict[str, Callable[[Layout], None]] = {
    "rt-detr": rt_detr,
    "rt-detr-ultralytics": ultralytics,
    "rt-detr-v2": rt_detr_v2,
    "rt-detr-v2-dsp": rt_detr_v2,
    "d-fine": d_fine,
    "deim": d_fine,
    "deimv2": deimv2,
    "rf-detr": rf_detr,
    "lw-detr": lw_detr,
}


def state_dict(name: str, seed: int = 0) -> dict[str, Tensor]:
    """The state dict of a small detector."""
    layout = Layout(seed)
    SMALL[name](layout)
    return layout.tensors


def write_small(path: Path, name: str, seed: int = 0) -> dict[str, Any]:
    """A checkpoint with the names of its classes; returns what is in it."""
    document = {"model": state_dict(name, seed), "class_names": list(LABELS), "epoch": 3}
    torch.save(document, path)
    return document
