"""What a configuration of mmdetection says of a detector that its tensors do not."""

import ast
import math
from collections.abc import Mapping
from typing import Any

from mfdetr_cache.detectors.checkpoint import Checkpoint
from mfdetr_cache.detectors.official.architecture import Arithmetic
from mfdetr_cache.detectors.preprocess import Preprocessing
from mfdetr_cache.errors import DetectorError

_ATTEND, _REFINE = ("self_attn", "norm"), ("ffn", "norm")
# Of Co-DETR, whose heads beside the DETR's are for its training.
_CO_HEADS = ("CoDINOHead", "CoDeformDETRHead")
_CO_TRANSFORMERS = ("CoDinoTransformer", "CoDeformableDetrTransformer")
# What changes numbers and no tensor tells, in a configuration of mmdetection: its value where it is
# left out, and those that are read.
_SETTINGS: dict[str, tuple[object, tuple[object, ...]]] = {
    "positional_encoding.normalize": (False, (True,)),
    "positional_encoding.scale": (math.tau, (math.tau,)),
    "positional_encoding.eps": (1e-6, (1e-6,)),
    "data_preprocessor.bgr_to_rgb": (False, (True,)),
    "data_preprocessor.pad_value": (0, (0,)),
    "eval_module": ("detr", ("detr",)),
    "backbone.type": (None, ("ResNet", "SwinTransformer", "SwinTransformerV1")),
    "backbone.style": ("pytorch", ("pytorch",)),
    "backbone.strides": (None, (None, [1, 2, 2, 2], [4, 2, 2, 2])),
    "backbone.dilations": (None, (None, [1, 1, 1, 1])),
    "backbone.qk_scale": (None, (None,)),
    "backbone.act_cfg.type": ("GELU", ("GELU",)),
    "neck.type": (None, ("ChannelMapper",)),
    "neck.act_cfg": ("ReLU", (None,)),
    "neck.norm_cfg.num_groups": (None, (32,)),
    "encoder.layer_cfg.self_attn_cfg.num_heads": (8, (8,)),
    "encoder.layer_cfg.ffn_cfg.act_cfg.type": ("ReLU", ("ReLU",)),
    "decoder.layer_cfg.self_attn_cfg.num_heads": (8, (8,)),
    "decoder.layer_cfg.cross_attn_cfg.num_heads": (8, (8,)),
    "decoder.layer_cfg.ffn_cfg.act_cfg.type": ("ReLU", ("ReLU",)),
    "encoder.layer_cfg.operation_order": (None, (None, [*_ATTEND, *_REFINE])),
    "decoder.layer_cfg.operation_order": (None, (None, [*_ATTEND, "cross_attn", "norm", *_REFINE])),
    "bbox_head.type": (None, ("DINOHead", "DeformableDETRHead", *_CO_HEADS)),
    "bbox_head.transformer.type": (None, (None, "DeformableDetrTransformer", *_CO_TRANSFORMERS)),
    "bbox_head.loss_cls.use_sigmoid": (False, (True,)),
}
_STEPS = {"LoadImageFromFile", "Resize", "LoadAnnotations", "PackDetInputs"}


def read_configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    """``preprocessing``, ``arithmetic`` and ``num_queries`` by the configuration in a file.

    DetectorError if there is none, or one that cannot be followed.
    """
    where = str(checkpoint.path)
    settings = checkpoint.settings
    config = _configuration(settings.get("cfg", settings.get("config")), where)
    try:
        if "cfg" not in settings:
            config = _as_version_3(config)
        return _follow({**config, "model": _with_parts(config["model"])}, where)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DetectorError(
            f"{where}: its configuration (meta.cfg) is not that of a DINO, Deformable DETR or "
            f"Co-DETR of mmdetection ({error})"
        ) from error


def _follow(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Preprocessing, arithmetic and number of queries of a configuration."""
    model = config["model"]
    kind = _setting(model, "type", None)
    dino = "DINO" in str(_setting(model, "bbox_head.type", kind))
    encoding, pixels = model["positional_encoding"], model["data_preprocessor"]
    steps = {
        str(step["type"]).rpartition(".")[2]: step
        for step in config["test_dataloader"]["dataset"]["pipeline"]
    }
    resize = steps["Resize"]
    width, height = map(int, resize["scale"])
    multiple = int(pixels.get("pad_size_divisor", 1))
    if min(width, height, multiple) < 1:
        raise ValueError(f"sizes of {width} x {height}, padded to multiples of {multiple}")
    keeps = bool(resize.get("keep_ratio", False))
    # Co-DETR's large-scale jittering attends to what is padded; it is version 3's default.
    attends = kind == "CoDETR" and bool(model.get("use_lsj", True))
    pad_value = _pad_value(steps, (width, height)) if keeps and attends else None
    fixed = pad_value is not None or not keeps
    uneven = (width % multiple or height % multiple) if fixed else attends and multiple > 1
    followed = _STEPS if pad_value is None else _STEPS | {"Pad"}
    unknown = next((name for name in steps if name not in followed), None)
    found = {
        "model.type": (kind, ("DINO", "DeformableDETR", "CoDETR")),
        "test pipeline's step": (unknown, (None,)),
        "data_preprocessor.pad_size_divisor": (multiple if uneven else 1, (1,)),
        "Resize.backend": (resize.get("backend", "cv2"), ("cv2",)),
        "Resize.interpolation": (resize.get("interpolation", "bilinear"), ("bilinear",)),
        **{name: (_setting(model, name, left), read) for name, (left, read) in _SETTINGS.items()},
    }
    for name, (value, read) in found.items():
        if value not in read:
            raise DetectorError(
                f"{where}: mmdetection's {name} = {value} is not read; DINO, Deformable DETR "
                "and Co-DETR with RGB input and a torchvision ResNet or a Swin are"
            )
    return {
        "preprocessing": Preprocessing(
            resize="mmcv",
            resample=2,
            rescale=1.0,
            mean=_three(pixels["mean"]),
            std=_three(pixels["std"]),
            height=height if fixed else None,
            width=width if fixed else None,
            shortest_edge=None if fixed else min(width, height),
            longest_edge=None if fixed else max(width, height),
            pads=pad_value is not None,
            pad_value=pad_value,
            pad_multiple=1 if fixed else multiple,
        ),
        "arithmetic": Arithmetic(
            float(encoding.get("temperature", 10000)),
            0.0 - float(encoding.get("offset", 0.0)),
            1e-3 if dino else 1e-5,
            1e-3 if dino and kind == "CoDETR" else 1e-5,
        ),
        "num_queries": int(model.get("num_queries", 300)),
    }


def _pad_value(steps: Mapping[str, Any], sides: tuple[int, int]) -> float | None:
    """The grey of images that are padded to a square; None where it is not done so."""
    pad = steps.get("Pad", {})
    value = pad.get("pad_val", 0)
    channels = value.get("img", 0) if isinstance(value, dict) else value
    values = set(channels) if isinstance(channels, list) else {channels}
    square = list(sides) == pad.get("size") and len(set(sides)) == 1
    return float(values.pop()) if square and len(values) == 1 else None


def _as_version_3(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of mmdetection 2 with the steps of a test as version 3 has them."""
    outer = {step["type"]: step for step in config["data"]["test"]["pipeline"]}
    augment = outer.pop("MultiScaleFlipAug")
    steps = {step["type"]: step for step in augment["transforms"]}
    order = list(steps)
    normalize, pad = steps.pop("Normalize"), steps.get("Pad", {})
    resize = {"keep_ratio": True, **steps.pop("Resize"), "scale": augment["img_scale"]}
    done = {"ImageToTensor", "DefaultFormatBundle", "Collect"}
    done |= set() if augment.get("flip") else {"RandomFlip"}
    # Version 3 pads to a multiple after the values are normalised, to a size before.
    after = "Pad" in order and order.index("Pad") > order.index("Normalize")
    if after and pad.keys() <= {"type", "size_divisor"}:
        done.add("Pad")
    elif after:
        steps["Pad"] = {"type": "Pad after Normalize"}
    left = [step for name, step in steps.items() if name not in done]
    pixels = {
        "mean": normalize["mean"],
        "std": normalize["std"],
        "bgr_to_rgb": normalize.get("to_rgb", True),
        "pad_size_divisor": pad.get("size_divisor", 1),
    }
    model = config["model"]
    attends = not model.get("with_attn_mask", True)
    return {
        "model": {**model, "data_preprocessor": pixels, "use_lsj": attends},
        "test_dataloader": {"dataset": {"pipeline": [*outer.values(), resize, *left]}},
    }


def _with_parts(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model with its parts where DINO of version 3 has them; others have them in their head."""
    head = model.get("query_head", model.get("bbox_head"))
    if "transformer" not in head:
        return dict(model)
    transformer = head["transformer"]
    parts = {}
    for part in ("encoder", "decoder"):
        layer = transformer[part]["transformerlayers"]
        attention = layer["attn_cfgs"]
        attention = attention if isinstance(attention, list) else [attention]
        parts[part] = {
            "layer_cfg": {
                "operation_order": layer["operation_order"],
                "self_attn_cfg": attention[0],
                "cross_attn_cfg": attention[-1],
                "ffn_cfg": {**layer, **layer.get("ffn_cfgs", {})},
            }
        }
    queries = head.get("num_query", 900)
    if "query_head" not in model and head.get("as_two_stage", False):
        queries = transformer.get("two_stage_num_proposals", 300)
    return {
        **model,
        **parts,
        "bbox_head": head,
        "positional_encoding": head["positional_encoding"],
        "num_queries": queries,
    }


def _setting(model: Mapping[str, Any], name: str, left_out: object) -> object:
    """A value of the configuration's model, of a type the last part of its name."""
    value: Any = model
    *outer, last = name.split(".")
    for key in outer:
        value = value.get(key) or {}
    value = value.get(last, left_out)
    return value.rpartition(".")[2] if last == "type" and isinstance(value, str) else value


def _three(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _configuration(text: object, where: str) -> dict[str, Any]:
    """The assignments of a configuration of mmengine; nothing of it is run."""
    if not isinstance(text, str):
        raise DetectorError(
            f"{where} is of mmdetection and does not hold its configuration (meta.cfg), without "
            "which its position encoding is not known; keep 'meta' beside the 'state_dict'"
        )
    found: dict[str, Any] = {}
    try:
        for line in ast.parse(text).body:
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                found[line.targets[0].id] = _plain(line.value)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DetectorError(f"{where}: its configuration (meta.cfg) cannot be read") from error
    return found


def _plain(node: ast.expr) -> Any:  # noqa: ANN401  any value of a configuration
    """A value of literals and ``dict(...)``; None for any other expression."""
    match node:
        case ast.Call(func=ast.Name(id="dict")):
            inner = [_plain(mapping) for mapping in node.args]
            named = {k.arg: _plain(k.value) for k in node.keywords}
            return {k: v for given in (*inner, named) for k, v in given.items()}
        case ast.List() | ast.Tuple():
            return [_plain(item) for item in node.elts]
        case ast.Dict():
            return {_plain(k): _plain(v) for k, v in zip(node.keys, node.values, strict=True) if k}
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
