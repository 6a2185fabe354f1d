"""Small checkpoints under the names of detrex and mmdetection.

``tests/real/layouts`` holds names, shapes and numbers of their own code with two layers of each
kind, a ResNet of one bottleneck a stage (or a small Swin), 12 queries and six classes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "real" / "layouts"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
CLASSES = tuple(f"kind {i}" for i in range(6))


def detector_of(name: str) -> str:
    """Value for --detector; Co-Deformable-DETR is H-DETR's one-to-one branch."""
    if "co_deformable" in name:
        return "h-detr"
    if "deformable" in name:
        return "deformable-detr"
    if "h_detr" in name:
        return "h-detr"
    return "dino-t20" if name == "detrex_dino_t20" else "dino"


_VERSION_2 = """
model = dict(
    type='DeformableDETR',
    backbone=dict(type='ResNet', depth=50, style='pytorch'),
    neck=dict(type='ChannelMapper', act_cfg=None, norm_cfg=dict(type='GN', num_groups=32)),
    bbox_head=dict(
        type='DeformableDETRHead',
        num_query=12,
        as_two_stage=AS_TWO_STAGE,
        transformer=dict(
            type='DeformableDetrTransformer',
            two_stage_num_proposals=12,
            encoder=dict(
                transformerlayers=dict(
                    attn_cfgs=dict(type='MultiScaleDeformableAttention', embed_dims=256),
                    operation_order=('self_attn', 'norm', 'ffn', 'norm'))),
            decoder=dict(
                transformerlayers=dict(
                    attn_cfgs=[
                        dict(type='MultiheadAttention', embed_dims=256, num_heads=8),
                        dict(type='MultiScaleDeformableAttention', embed_dims=256)
                    ],
                    operation_order=('self_attn', 'norm', 'cross_attn', 'norm', 'ffn', 'norm')))),
        positional_encoding=dict(num_feats=128, normalize=True, offset=-0.5),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True)))
data = dict(
    test=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(
                type='MultiScaleFlipAug',
                img_scale=(1333, 800),
                flip=False,
                transforms=[
                    dict(type='Resize', keep_ratio=True),
                    dict(type='RandomFlip'),
                    dict(
                        type='Normalize',
                        mean=[123.675, 116.28, 103.53],
                        std=[58.395, 57.12, 57.375],
                        to_rgb=True),
                    dict(type='Pad', size_divisor=1),
                    dict(type='ImageToTensor', keys=['img']),
                    dict(type='Collect', keys=['img'])
                ])
        ]))
"""


def _co_detr(name: str) -> str:
    """A configuration of Co-DETR: its heads and its steps beside those of ``_VERSION_2``."""
    dino = "dino" in name
    kinds = {
        "'DeformableDETR'": "'CoDETR', bbox_head=[dict(type='CoATSSHead', num_classes=6)]",
        "bbox_head=dict(": "query_head=dict(",
        "AS_TWO_STAGE": "True",
        "two_stage_num_proposals=12,": "num_co_heads=2,",
        "'DeformableDETRHead'": "'CoDINOHead'" if dino else "'CoDeformDETRHead'",
        "'DeformableDetrTransformer'": "'CoDinoTransformer'"
        if dino
        else "'CoDeformableDetrTransformer'",
        "offset=-0.5": "temperature=20" if dino else "offset=-0.5",
        "'FocalLoss'": "'QualityFocalLoss'",
    }
    if "swin" in name:
        kinds["type='ResNet', depth=50, style='pytorch'"] = "type='SwinTransformerV1', embed_dim=16"
    text = _VERSION_2
    for old, new in kinds.items():
        assert old in text
        text = text.replace(old, new, 1)
    return text


def config(name: str, change: tuple[str, str] = ("", "")) -> str:
    """What mmengine or mmcv writes into a file, in part; ``change`` replaces a piece of it."""
    if name.startswith("mmdet2"):
        text = _VERSION_2.replace("AS_TWO_STAGE", str("two_stage" in name))
        if "_co_" in name:
            text = _co_detr(name)
        assert change[0] in text
        return text.replace(*change)
    kind = "DINO" if "dino" in name else "DeformableDETR"
    near = "offset=0.0, temperature=20" if name.startswith("mmdet_dino") else "offset=-0.5"
    near = "offset=-0.5, temperature=10000" if "improved" in name else near
    backbone = "backbone=dict(depth=50, norm_eval=True, style='pytorch', type='ResNet'),"
    if "swin" in name:
        backbone = (
            "backbone=dict(mlp_ratio=4, qk_scale=None, type='SwinTransformer', with_cp=True),"
        )
    text = f"""
default_hooks = dict(checkpoint=dict(interval=1, type='CheckpointHook'))
model = dict(
    {backbone}
    bbox_head=dict(loss_cls=dict(type='FocalLoss', use_sigmoid=True), type='{kind}Head'),
    data_preprocessor=dict(
        bgr_to_rgb=True, mean=[123.675, 116.28, 103.53], pad_size_divisor=1,
        std=[58.395, 57.12, 57.375], type='DetDataPreprocessor'),
    decoder=dict(layer_cfg=dict(self_attn_cfg=dict(embed_dims=256, num_heads=8))),
    encoder=dict(layer_cfg=dict(ffn_cfg=dict(embed_dims=256, ffn_drop=0.0))),
    neck=dict(
        act_cfg=None, kernel_size=1, norm_cfg=dict(num_groups=32, type='GN'), num_outs=4,
        type='ChannelMapper'),
    num_queries=12,
    positional_encoding=dict(normalize=True, num_feats=128, {near}),
    type='{kind}')
test_dataloader = dict(batch_size=1, dataset=dict(pipeline=[
    dict(backend_args=None, type='LoadImageFromFile'),
    dict(keep_ratio=True, scale=(1333, 800), type='Resize')]))
"""
    assert change[0] in text
    return text.replace(*change)


def about(name: str) -> dict[str, Any]:
    """Shapes, the names that share a tensor, and the salt of the rule."""
    return dict(json.loads(str(np.load(FOLDER / f"{name}.npz")["about"])))


def document(
    name: str, tensors: dict[str, torch.Tensor], change: tuple[str, str] = ("", "")
) -> dict[str, Any]:
    """A checkpoint as the code base writes it."""
    if name.startswith("detrex"):
        return {"model": tensors, "iteration": 7}
    meta = {"cfg": config(name, change), "epoch": 12, "dataset_meta": {"classes": CLASSES}}
    if name.startswith("mmdet2"):
        meta = {"config": config(name, change), "epoch": 12, "CLASSES": CLASSES}
    return {"meta": meta, "state_dict": tensors, "message_hub": {}}


def random_tensors(name: str) -> dict[str, torch.Tensor]:
    """Always the same weights, which give finite numbers."""
    torch.manual_seed(0)
    known = about(name)
    made: dict[str, torch.Tensor] = {}
    for key, shape in known["shapes"].items():
        if key.endswith("relative_position_index"):
            continue
        spread = torch.rand(shape) if key.endswith("running_var") else torch.randn(shape)
        made[key] = made[known["tied"][key]] if key in known["tied"] else 0.05 * spread
    return made
