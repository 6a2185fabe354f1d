"""The model to build for a checkpoint, and the renaming of its tensors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfdetr_cache.detectors.huggingface.families import Family
from mfdetr_cache.detectors.names import Rules, count
from mfdetr_cache.errors import DetectorError

# Computed and not learned, used in training only, or left behind by a count of operations (thop).
_UNUSED = (
    r"num_batches_tracked$|anchors$|valid_mask$|denoising_class_embed|(^|\.)total_(ops|params)$"
)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A detector inferred from a checkpoint.

    Attributes:
        family: Location of its maps.
        build: Builds the model without weights, computing what the authors' code computes.
        rules: Names of the checkpoint to names of the model.
        unused: Names that the model ignores.
        input_hw: Height and width of the network input; None where it keeps the image's shape.
        normalise: Whether ImageNet's mean and deviation are applied (else the values are in 0..1).
        resize: Whose code resizes an image, as of :class:`Preprocessing`.
        side_multiple: What the sides of an input must be multiples of.
        choices: Settings that the file lacks and that change the outputs; part of the identity.
    """

    family: Family
    build: Callable[[], Any]
    rules: Rules
    tensors: Mapping[str, Tensor]
    input_hw: tuple[int, int] | None
    normalise: bool
    resize: Literal["PIL", "mmcv"] = "PIL"
    side_multiple: int = 32
    unused: str = _UNUSED
    choices: Mapping[str, object] = field(default_factory=dict)

    def keys(self) -> list[str]:
        """Names of the tensors that the model needs."""
        pattern = re.compile(f"{self.unused}|{_UNUSED}")
        return [key for key in self.tensors if not pattern.search(key)]


class Mlp(nn.Module):
    """Linear layers of an existing head, shared and not copied, with an activation in between."""

    def __init__(self, layers: nn.ModuleList, activation: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.activation = activation

    def forward(self, values: Tensor) -> Tensor:
        """Shape (..., C) to (..., C')."""
        for layer in self.layers[:-1]:
            values = self.activation(layer(values))
        result: Tensor = self.layers[-1](values)
        return result


class ColumnsFirst(nn.Module):
    """The position table of the hybrid encoder as its authors flatten it: column by column.

    Tokens are row-major. On a square map the two differ by a consistent renaming of the axes; on
    another one the tokens get other positions, which is reproduced here. ``table`` is transformers'
    row-major one.
    """

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, *, width: int, height: int, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """The table of a map, shape (1, height * width, C); ``kwargs`` are device and dtype."""
        result: Tensor = self.table(width=height, height=width, **kwargs)
        return result


def restore_hybrid_encoder(model: Any, tensors: Mapping[str, Tensor]) -> None:  # noqa: ANN401
    """Correct, in place, the hybrid encoder of RT-DETR and its descendants to the authors' code.

    ``tensors`` is the state dict that will be loaded.
    """
    for layer in getattr(model.model.encoder, "aifi", ()):
        layer.position_embedding = ColumnsFirst(layer.position_embedding)
    # Some of the authors leave out the projection of a map that has the right width.
    places = model.model if hasattr(model.model, "encoder_input_proj") else model.model.conv_encoder
    projections = getattr(places, "encoder_input_proj", nn.ModuleList())
    for i in range(len(projections)):
        if not any(key.startswith(f"encoder.input_proj.{i}.") for key in tensors):
            projections[i] = nn.Identity()


def build_hybrid(kind: Any, config: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    """A model of RT-DETR or a descendant without weights, for this state dict."""
    with no_weights():
        model = kind(config)
    # Most list their heads twice; those of the decoder are used.
    for name in ("class_embed", "bbox_embed"):
        if hasattr(model, name):
            delattr(model, name)
    restore_hybrid_encoder(model, tensors)
    return model


def hybrid_levels(tensors: Mapping[str, Tensor]) -> int:
    """Levels of a hybrid encoder: one more than its lateral convolutions."""
    return count(tensors, r"encoder\.lateral_convs\.(\d+)\.") + 1


def input_size(
    tensors: Mapping[str, Tensor], strides: tuple[int, ...], default: int = 640
) -> tuple[int, int]:
    """Input height and width that a checkpoint was made for, inferred from its anchors.

    ``decoder.anchors`` are logits of cx, cy, w, h; where there are none the sides are ``default``,
    the authors'. ``strides`` are those of its levels, finest first.
    """
    anchors = tensors.get("decoder.anchors")
    if anchors is None or anchors.is_meta:
        return default, default
    boxes = anchors[0].double().sigmoid()
    # The level l has boxes of 0.05 * 2^l; those too near to the border are infinite, 1 here.
    finest = boxes[(boxes[:, 2] - 0.05).abs() < 1e-3]
    sides = []
    for axis in (1, 0):
        centres = finest[:, axis].mul(1e5).round().unique().div(1e5)
        if len(centres) < 2:
            return default, default
        step = centres.diff().median()
        sides.append(round(1 / float(step)) * strides[0])
    tokens = sum(-(-sides[0] // s) * -(-sides[1] // s) for s in strides)
    return (sides[0], sides[1]) if tokens == len(boxes) else (default, default)


def points_of_levels(scale: Tensor, levels: int) -> list[int]:
    """Sampling points of each level, inferred from their scale (1/n for each of n points).

    ``scale`` is ``num_points_scale``, shape (sum of points,); on the meta device points are equal.
    DetectorError if it is none.
    """
    total = int(scale.shape[0])
    if scale.is_meta:
        return [total // levels] * (levels - 1) + [total - total // levels * (levels - 1)]
    points: list[int] = []
    while sum(points) < total:
        share = float(scale[sum(points)])
        if not 0.9 / total <= share <= 1:
            raise DetectorError(f"num_points_scale has {share}: these weights are damaged")
        points.append(round(1 / share))
    return points


def silu_mlp(head: Any) -> Mlp:  # noqa: ANN401
    """A head of transformers with SiLU in place of its ReLU; the layers are the same."""
    return Mlp(head.layers, nn.SiLU())


def no_weights() -> torch.device:
    """Where a model is built that gets all of its tensors from a file."""
    return torch.device("meta")
