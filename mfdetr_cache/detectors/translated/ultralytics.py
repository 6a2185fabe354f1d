"""RT-DETR as ultralytics trains it: the layers of lyuwenyu/RT-DETR, numbered in one list."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.names import Rules, carry, translate
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.translated.blueprint import Blueprint
from mfdetr_cache.detectors.translated.rt_detr import read_rt_detr
from mfdetr_cache.errors import DetectorError

# ultralytics sets it in every batch norm of a model; torch's own is 1e-5.
_BATCH_NORM_EPS = 1e-3
_DEFAULT_SIDE, _LONGEST_SIDE = 640, 8192
# What tells the kind of a numbered layer, and what its kind is called below.
_KINDS = (
    ("stem1.conv.weight", "stem"),
    ("m.0.conv.weight", "block"),
    ("m.0.conv1.conv.weight", "block"),  # of light convolutions, or a fusion block
    ("ma.in_proj_weight", "attention"),
    ("dec_score_head.0.weight", "decoder"),
    ("conv.weight", "conv"),
)
# Behind the backbone, in the order of the list. Layers without parameters have numbers too.
_NECK = (
    ("conv", "encoder.input_proj.2"),
    ("attention", "encoder.encoder.0.layers.0"),
    ("conv", "encoder.lateral_convs.0"),
    ("conv", "encoder.input_proj.1"),
    ("block", "encoder.fpn_blocks.0"),
    ("conv", "encoder.lateral_convs.1"),
    ("conv", "encoder.input_proj.0"),
    ("block", "encoder.fpn_blocks.1"),
    ("conv", "encoder.downsample_convs.0"),
    ("block", "encoder.pan_blocks.0"),
    ("conv", "encoder.downsample_convs.1"),
    ("block", "encoder.pan_blocks.1"),
    ("decoder", "decoder"),
)
_INNER: Rules = (
    (r"^(backbone\..*\.blocks\.\d+)\.m\.", r"\1.layers."),
    (r"^(backbone\..*\.blocks\.\d+)\.sc\.", r"\1.aggregation.0."),
    (r"^(backbone\..*\.blocks\.\d+)\.ec\.", r"\1.aggregation.1."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d)\.cv(\d)\.", r"\1.conv\2."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d)\.m\.", r"\1.bottlenecks."),
    (r"^(encoder\..*)\.bn\.", r"\1.norm."),
    (r"^(encoder\.encoder\..*)\.ma\.", r"\1.self_attn."),
    (r"^(encoder\.encoder\..*)\.fc([12])\.", r"\1.linear\2."),
    (r"^decoder\.input_proj\.(\d)\.0\.", r"decoder.input_proj.\1.conv."),
    (r"^decoder\.input_proj\.(\d)\.1\.", r"decoder.input_proj.\1.norm."),
    (r"^decoder\.enc_output\.0\.", "decoder.enc_output.proj."),
    (r"^decoder\.enc_output\.1\.", "decoder.enc_output.norm."),
    (r"^decoder\.layers\.", "decoder.decoder.layers."),
)


def is_ultralytics(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is an RT-DETR's of ultralytics."""
    return any(re.fullmatch(r"\d+\.dec_score_head\.0\.weight", key) for key in tensors)


def read_ultralytics(checkpoint: Checkpoint, options: DetectorOptions) -> Blueprint:
    """Blueprint of a checkpoint of ``rtdetr-l`` or ``rtdetr-x``, fine-tuned ones too.

    DetectorError for a model of other layers.
    """
    own = _numbers(checkpoint)
    renamed = carry(checkpoint.tensors, translate(checkpoint.tensors, own))
    as_authors = replace(checkpoint, tensors=renamed)
    blueprint = read_rt_detr(as_authors, options, freeze_batch_norms=False)
    return replace(
        blueprint,
        build=partial(_build, blueprint.build),
        rules=(*own, *blueprint.rules),
        tensors=checkpoint.tensors,
        input_hw=_input_hw(checkpoint.settings),
        resize="mmcv",
    )


def _input_hw(settings: Mapping[str, Any]) -> tuple[int, int]:
    """The size of the training, or the default where the file has none that can be."""
    side = settings.get("imgsz")
    sides = side if isinstance(side, (list, tuple)) else [side]
    sizes = [s for s in sides if isinstance(s, int) and 32 <= s <= _LONGEST_SIDE]
    if sizes and len(sizes) == len(sides):
        return sizes[0], sizes[-1]
    return _DEFAULT_SIDE, _DEFAULT_SIDE


def _build(build: Callable[[], Any]) -> Any:  # noqa: ANN401
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = _BATCH_NORM_EPS
    for layer in model.model.encoder.aifi:
        # Row by row, which on a square is the authors' table; older versions had theirs everywhere.
        layer.position_embedding = layer.position_embedding.table
    return model


def _numbers(checkpoint: Checkpoint) -> Rules:
    """Rules from the numbers of a model's layers to the names of RT-DETR's authors."""
    tensors = checkpoint.tensors
    found = (re.match(r"([0-9]{1,4})\.", key) for key in tensors)
    numbers = sorted({int(match[1]) for match in found if match})
    kinds = [_kind(tensors, number) for number in numbers]
    backbone, neck = kinds[: -len(_NECK)], kinds[-len(_NECK) :]
    if backbone[:1] != ["stem"] or neck != [kind for kind, _ in _NECK]:
        raise DetectorError(
            f"{checkpoint.path}: an RT-DETR of ultralytics, but neither rtdetr-l nor rtdetr-x; "
            "only these are read"
        )
    places = ["backbone.stem", *_stages(backbone[1:]), *(place for _, place in _NECK)]
    layers = tuple(
        (rf"^{number}\.", f"{place}.") for number, place in zip(numbers, places, strict=True)
    )
    return (*layers, *_INNER)


def _stages(kinds: Sequence[str]) -> list[str]:
    """Place of each layer of the backbone after the stem; a convolution begins a new stage."""
    places, stage, block = [], 0, 0
    for kind in kinds:
        if kind == "conv":
            stage, block = stage + 1, 0
            places.append(f"backbone.stages.{stage}.downsample")
        else:
            places.append(f"backbone.stages.{stage}.blocks.{block}")
            block += 1
    return places


def _kind(tensors: Mapping[str, Tensor], number: int) -> str:
    return next((kind for name, kind in _KINDS if f"{number}.{name}" in tensors), "another")
