"""Small torchvision detectors with random weights, in the place of its builders."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from mfdetr_cache.detectors.torchvision import loading

_WIDTH = 64
# Labels 1 and 2; 0 is the background, or an output that is never trained.
OUTPUTS = 3
# Scale and bias of the classes, by which images have from none to some dozen detections.
_SCORES = {"fasterrcnn": (0.3, -4.0), "retinanet": (0.1, -5.0), "fcos": (1.0, -4.2)}


def _convolution(width: int, out: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, out, 3, 1 + (width > 8 or out > 8), 1, bias=False), norm(out), nn.ReLU()
    )


def _backbone(first: int, norm: Callable[[int], nn.Module]) -> BackboneWithFPN:
    body = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, 8, 7, 2, 3, bias=False),
        bn1=norm(8),
        relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(3, 2, 1),
    )
    for i, out in enumerate((8, 12, 16, 20)):
        body[f"layer{i + 1}"] = _convolution((8, 8, 12, 16)[i], out, norm)
    layers = {f"layer{k}": str(i) for i, k in enumerate(range(first, 5))}
    channels = list((8, 12, 16, 20)[first - 1 :])
    extra = LastLevelP6P7(_WIDTH, _WIDTH) if first == 2 else None
    return BackboneWithFPN(nn.Sequential(body), layers, channels, _WIDTH, extra_blocks=extra)


def small_model(
    name: str,
    num_classes: int = OUTPUTS,
    *,
    frozen: bool = False,
    min_size: int = 96,
    max_size: int = 160,
    **_: Any,
) -> Any:
    """A detector built as torchvision builds the one of that name, seeded, in evaluation mode."""
    sizes = {"min_size": min_size, "max_size": max_size}
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    model: Any
    if name.startswith("fasterrcnn"):
        head, predictor = TwoMLPHead(_WIDTH * 49, 64), FastRCNNPredictor(64, num_classes)
        model = FasterRCNN(_backbone(1, norm), box_head=head, box_predictor=predictor, **sizes)
        last = predictor.cls_score
    else:
        kind = RetinaNet if name.startswith("retinanet") else FCOS
        model = kind(_backbone(2, norm), num_classes, **sizes)
        last = model.head.classification_head.cls_logits
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.mul_(0.3).add_(torch.rand_like(value))
            elif value.ndim > 1:
                nn.init.kaiming_normal_(value)
        scale, bias = _SCORES[name.split("_")[0]]
        last.weight.mul_(scale)
        last.bias.fill_(bias)
        # Of every anchor.
        last.bias.view(-1, num_classes)[:, 0] = 0 if name.startswith("fasterrcnn") else -20
    return model.eval()


def write_small(
    path: Path, name: str, monkeypatch: pytest.MonkeyPatch, *, frozen: bool = False
) -> Any:
    """A state dict, and a loader that builds such models; returns the model."""
    monkeypatch.setattr(loading, "get_model", small_model)
    model = small_model(name, frozen=frozen)
    torch.save(model.state_dict(), path)
    return model
