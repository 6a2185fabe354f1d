"""Faster R-CNN, RetinaNet and FCOS from state dicts of torchvision or of a user's training."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.ops import FrozenBatchNorm2d

from mfdetr_cache.config import nearest
from mfdetr_cache.detectors.checkpoint import Checkpoint, read_checkpoint
from mfdetr_cache.detectors.labels import COCO_NAMES, output_names
from mfdetr_cache.detectors.names import Marks
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.detectors.preprocess import sides_to_fit
from mfdetr_cache.detectors.torchvision.adapter import TorchvisionDetector
from mfdetr_cache.detectors.weights import require_complete
from mfdetr_cache.errors import DetectorError

PREFIX = "torchvision:"
# The published v1 weights were trained with frozen norms without epsilon, and torchvision takes it
# away again when it loads them; what is tuned from them in that process has none either. No file
# says it, so the name does.
_NO_EPSILON = "-eps0"
_LONGEST = 1333  # torchvision's default


@dataclass(frozen=True, slots=True)
class TorchvisionModel:
    """A detection model of torchvision.

    Attributes:
        levels: Strides of the encoder maps.
        width: Width of the queries.
        marks: Names of its state dict.
        without_epsilon: Whether torchvision takes the epsilon of its published weights' norms away.
    """

    label: str
    backbone: str
    levels: str
    width: int
    queries: int
    c1: int
    marks: Marks
    without_epsilon: bool = False


_CLASS_SCORE = "roi_heads.box_predictor.cls_score.weight"
_CLASS_LOGITS = "head.classification_head.cls_logits.weight"
_BOXES = "head.regression_head.bbox_reg.weight"
_CENTRE = "head.regression_head.bbox_ctrness.weight"
_GROUP_NORM = "head.classification_head.conv.0.1.weight"
_MOBILE = "backbone.body.0.0.weight"
_TWO_LAYERS = "roi_heads.box_head.fc6.weight"
_MORE_THAN_BOXES = (
    "roi_heads.mask_predictor.conv5_mask.weight",
    "roi_heads.keypoint_predictor.kps_score_lowres.weight",
)
_CONVOLUTIONS = "roi_heads.box_head.0.0.weight"

MODELS: dict[str, TorchvisionModel] = {
    f"{PREFIX}fasterrcnn_resnet50_fpn": TorchvisionModel(
        "Faster R-CNN",
        "R50",
        "8-32",
        1024,
        100,
        256,
        Marks((_TWO_LAYERS,), (_MOBILE, *_MORE_THAN_BOXES)),
        without_epsilon=True,
    ),
    f"{PREFIX}fasterrcnn_resnet50_fpn_v2": TorchvisionModel(
        "Faster R-CNN v2", "R50", "8-32", 1024, 100, 256, Marks((_CONVOLUTIONS,), _MORE_THAN_BOXES)
    ),
    f"{PREFIX}fasterrcnn_mobilenet_v3_large_fpn": TorchvisionModel(
        "Faster R-CNN", "MobileNetV3-L", "32", 1024, 100, 24, Marks((_MOBILE,))
    ),
    f"{PREFIX}fasterrcnn_mobilenet_v3_large_320_fpn": TorchvisionModel(
        "Faster R-CNN, 320 pixels", "MobileNetV3-L", "32", 1024, 100, 24, Marks((_MOBILE,))
    ),
    f"{PREFIX}retinanet_resnet50_fpn": TorchvisionModel(
        "RetinaNet",
        "R50",
        "8-128",
        256,
        300,
        256,
        Marks((_CLASS_LOGITS,), (_CENTRE, _GROUP_NORM)),
        without_epsilon=True,
    ),
    f"{PREFIX}retinanet_resnet50_fpn_v2": TorchvisionModel(
        "RetinaNet v2", "R50", "8-128", 256, 300, 256, Marks((_GROUP_NORM,))
    ),
    f"{PREFIX}fcos_resnet50_fpn": TorchvisionModel(
        "FCOS", "R50", "8-128", 256, 100, 256, Marks((_CENTRE,))
    ),
}
TORCHVISION_NAMES = tuple(
    name + suffix
    for name, model in MODELS.items()
    for suffix in (("", _NO_EPSILON) if model.without_epsilon else ("",))
)


def recognised_torchvision(checkpoint: Checkpoint) -> list[str]:
    """Names that a state dict may be loaded by; several where it is ambiguous."""
    tensors, found = checkpoint.tensors, []
    for name, model in MODELS.items():
        if model.marks(tensors):
            unsure = model.without_epsilon and _is_frozen(tensors)
            unsure = unsure and not _is_published(name, checkpoint.path)
            found += [name, name + _NO_EPSILON] if unsure else [name]
    return found


def load_torchvision_detector(
    name: str, weights: str, options: DetectorOptions
) -> TorchvisionDetector:
    """A torchvision detector from a state dict, frozen, on the CPU.

    ``name`` is one of :data:`TORCHVISION_NAMES`. DetectorError if it is unknown, the checkpoint is
    of another detector, or its tensors do not fit.
    """
    plain = name.removesuffix(_NO_EPSILON)
    if name not in TORCHVISION_NAMES:
        raise DetectorError(f"unknown detector {name!r}{nearest(name, list(TORCHVISION_NAMES))}")
    checkpoint = read_checkpoint(Path(weights))
    others = recognised_torchvision(checkpoint)
    if plain not in others:
        other = f"; it can be {' or '.join(others)}" if others else ""
        raise DetectorError(f"{weights} is no state dict of {MODELS[plain].label}{other}")
    tensors = checkpoint.tensors
    frozen, outputs = _is_frozen(tensors), _num_outputs(tensors)
    if name != plain and not frozen:
        raise DetectorError(f"{weights} has norms that are not frozen; pass --detector {plain}")
    sizes = {}
    if options.input_size:
        sizes["min_size"], sizes["max_size"] = sides_to_fit(options.input_size, _LONGEST)
    model = get_model(
        plain.removeprefix(PREFIX),
        weights=None,
        weights_backbone=None,
        num_classes=outputs,
        **sizes,
    )
    settings: dict[str, object] = {}
    if frozen:
        bare = name != plain or (
            MODELS[plain].without_epsilon and _is_published(plain, Path(weights))
        )
        settings["frozen_norm_epsilon"] = epsilon = 0.0 if bare else 1e-5
        _freeze_norms(model.backbone.body, epsilon)
    _load(model, tensors, weights)
    if options.labels:
        settings["labels"] = "given"
    first = 1 if _CLASS_SCORE in tensors else 0
    names = _names(outputs, first, checkpoint.class_names, options.labels, weights)
    return TorchvisionDetector(name, model, names, settings, options)


def _is_frozen(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the backbone's norms were frozen in training; only others count their batches."""
    return not any(
        k.startswith("backbone.body.") and k.endswith("num_batches_tracked") for k in tensors
    )


def _is_published(name: str, path: Path) -> bool:
    """Whether a file is what torchvision downloads, whose hash stands in its address."""
    address = str(get_model_weights(name.removeprefix(PREFIX)).COCO_V1.url)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return address.endswith(f"-{digest[:8]}.pth")


def _num_outputs(tensors: Mapping[str, Tensor]) -> int:
    """Class outputs, the background of Faster R-CNN among them."""
    if _CLASS_SCORE in tensors:
        return len(tensors[_CLASS_SCORE])
    anchors = len(tensors[_BOXES]) // 4
    return len(tensors[_CLASS_LOGITS]) // max(anchors, 1)


def _freeze_norms(module: nn.Module, epsilon: float) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, epsilon))
        else:
            _freeze_norms(child, epsilon)


def _load(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    try:
        result = model.load_state_dict(dict(tensors), strict=False)
    except RuntimeError as error:
        line = str(error).splitlines()[1].strip()
        raise DetectorError(f"{where}: {line}") from error
    require_complete(where, result.missing_keys, result.unexpected_keys)


def _names(
    outputs: int, first: int, stored: Sequence[str], given: Sequence[str], where: str
) -> tuple[str, ...]:
    """A name for every output from ``first``, which is 1 where output 0 is the background.

    Names are those of all outputs, or of all but output 0.
    """
    known: dict[int, str] = {}
    if not (given or stored) and outputs == max(COCO_NAMES) + 1:
        known = {i - first: name for i, name in COCO_NAMES.items()}
    names = given or stored
    if len(names) in (outputs - 1, outputs):
        known = dict(enumerate(names, outputs - len(names) - first))
    elif given:
        raise DetectorError(
            f"--labels has {len(given)} names and {where} has {outputs} class outputs, the first "
            f"perhaps for the background; give {outputs - 1} or {outputs} names in their order"
        )
    return output_names(outputs - first, known, (), where)
