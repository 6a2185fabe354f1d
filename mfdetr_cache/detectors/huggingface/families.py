"""Differences between the transformers detectors: location of their maps, and corrections."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor, nn

from mfdetr_cache.detectors.huggingface.deimv2 import restore_original_deimv2

EncoderMaps = Literal["outputs", "layers", "tokens", "projector"]
ENCODER_MAPS: dict[EncoderMaps, str] = {
    "outputs": "final maps",
    "layers": "layer N of the encoder (default 4)",
    "tokens": "one level at stride 32, layer N (default 4)",
    "projector": "the projector's maps",
}


@dataclass(frozen=True, slots=True)
class Family:
    """How one transformers model type is read.

    Attributes:
        label: Display name.
        encoder_maps: ``outputs`` when the forward returns the final maps as a list, ``layers``
            when the encoder is a stack of transformer layers over flattened levels, ``tokens``
            when it is such a stack over the backbone's last map alone, ``projector`` when a plain
            ViT's projector replaces the encoder.
        checked: Reference its outputs were verified against.
        takes_mask: Whether padding is masked (else the input has one fixed size).
        correct: Changes a loaded model to compute what its authors' code computes; None if it
            already does.
        score_function: ``softmax`` where the last class is "no object".
        takes_prompt: Whether its classes are words that it reads with the image.
    """

    model_type: str
    label: str
    encoder_maps: EncoderMaps
    backbone: Callable[[nn.Module], nn.Module]
    checked: str = "nothing independent; it runs with random weights"
    takes_mask: bool = False
    correct: Callable[[nn.Module], None] | None = None
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    takes_prompt: bool = False


def _conv_encoder(model: Any) -> nn.Module:  # noqa: ANN401
    encoder: nn.Module = model.model.conv_encoder
    # DINOv3 and the convolutions beside it are one backbone.
    backbone: nn.Module = getattr(encoder, "model", encoder)
    return backbone


_plain_backbone = attrgetter("model.backbone.model")
_nested_backbone = attrgetter("model.backbone.conv_encoder.model")
_vit_backbone = attrgetter("model.backbone.backbone")

_AUTHORS_CODE = "the authors' code, from libreyolo 1.6: 2e-4 in logits and boxes"
_GOLDENS = "the authors' code: 5e-4 in logits and queries, 2e-5 in boxes"
_ONNX = "original ONNX export: 1e-3 in score, 0.5 px"
_OURS = "this package's Deformable DETR: 1e-4 in logits, 1e-5 in boxes"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "deimv2", "DEIMv2", "outputs", _conv_encoder, _ONNX, correct=restore_original_deimv2
        ),
        Family("rt_detr", "RT-DETR", "outputs", _plain_backbone, _AUTHORS_CODE),
        Family("rt_detr_v2", "RT-DETRv2", "outputs", _plain_backbone, _AUTHORS_CODE),
        Family("d_fine", "D-FINE", "outputs", _plain_backbone, _AUTHORS_CODE),
        Family(
            "deformable_detr", "Deformable DETR", "layers", _plain_backbone, _OURS, takes_mask=True
        ),
        Family(
            "detr", "DETR", "tokens", _plain_backbone, takes_mask=True, score_function="softmax"
        ),
        Family("conditional_detr", "Conditional DETR", "tokens", _plain_backbone, takes_mask=True),
        Family("dab-detr", "DAB-DETR", "tokens", _nested_backbone, takes_mask=True),
        Family(
            "grounding-dino",
            "Grounding DINO",
            "layers",
            _nested_backbone,
            _GOLDENS,
            takes_mask=True,
            takes_prompt=True,
        ),
        Family(
            "mm-grounding-dino",
            "MM-Grounding-DINO",
            "layers",
            _nested_backbone,
            takes_mask=True,
            takes_prompt=True,
        ),
        Family("lw_detr", "LW-DETR", "projector", _vit_backbone, _AUTHORS_CODE),
        Family("rf_detr", "RF-DETR", "projector", _vit_backbone, _AUTHORS_CODE),
    )
}


def backbone_stages(backbone: Any) -> list[nn.Module]:  # noqa: ANN401
    """Stage modules of a transformers or timm backbone, finest first; empty for a plain ViT."""
    adapter = getattr(backbone, "spatial_tuning_adapter", None)
    if adapter is not None:
        return [adapter.stem_pool]
    swin = getattr(backbone, "swin", None)
    if swin is not None:
        return list(swin.encoder.layers)
    encoder = getattr(backbone, "encoder", None)
    stages = getattr(encoder, "stages", None)
    if stages is not None:
        return list(stages)
    timm_layers = [getattr(backbone, f"layer{i}", None) for i in range(1, 5)]
    return [layer for layer in timm_layers if isinstance(layer, nn.Module)]


def first_tensor(output: object) -> Tensor:
    """The first tensor of a module's output, also of nested tuples; TypeError if there is none."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output:
        return first_tensor(output[0])
    raise TypeError(f"no tensor in {type(output).__name__}")


def stage_map(output: object) -> Tensor:
    """The map (B, C, h, w) in a backbone stage's output; Swin gives tokens of the next one too."""
    if isinstance(output, (tuple, list)):
        maps = [part for part in output if isinstance(part, Tensor) and part.ndim == 4]
        return first_tensor(maps or output)
    return first_tensor(output)
