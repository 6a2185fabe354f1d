"""The backbones of the official checkpoints, with the checkpoints' own parameter names.

Each returns the raw output of its four stages (strides 4 to 32) and the encoder's input.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops.misc import FrozenBatchNorm2d

from mfdetr_cache.detectors.official.convnext import ConvNeXt
from mfdetr_cache.detectors.official.focalnet import FocalModulation, FocalNet
from mfdetr_cache.detectors.official.swin import Swin

BackboneKind = Literal["resnet", "swin", "focalnet", "convnext"]


@dataclass(frozen=True, slots=True)
class BackboneArchitecture:
    """Hyperparameters of a backbone, all of them inferred from a checkpoint's shapes.

    Attributes:
        width: Channels of the first stage (ResNet: 256).
        heads: Attention heads of each stage (Swin).
        window: Side of the attention window (Swin).
        kernels: Focal kernel sizes of the first stage (FocalNet).
        first_stage: First stage that enters the encoder: 1 for 4-scale, 0 for 5-scale detectors.
        by_channel: Whether a Swin merges patches channel by channel (mmdetection's does).
        divides: Whether a FocalNet divides its modulator by the number of its terms.
    """

    kind: BackboneKind
    depths: tuple[int, ...]
    width: int
    heads: tuple[int, ...] = ()
    window: int = 0
    kernels: tuple[int, ...] = ()
    first_stage: int = 1
    by_channel: bool = False
    divides: bool = False

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of the four stages."""
        return tuple(self.width << i for i in range(4))

    @property
    def label(self) -> str:
        """Its name for people."""
        if self.kind == "resnet":
            return f"ResNet-{3 * sum(self.depths) + 2}"
        name = {"swin": "Swin", "convnext": "ConvNeXt"}.get(
            self.kind, f"FocalNet fl{len(self.kernels)}"
        )
        return f"{name} of width {self.width}, depths {'-'.join(map(str, self.depths))}"


class Backbone(nn.Module):
    """A backbone below ``body``, or (DINO's Swin, FocalNet) not, as in the checkpoints."""

    def __init__(self, architecture: BackboneArchitecture) -> None:
        super().__init__()
        self.first_stage = architecture.first_stage
        if architecture.kind == "resnet":
            # torchvision's v1.5; C1 is taken after its ReLU.
            full = ResNet(Bottleneck, list(architecture.depths), norm_layer=FrozenBatchNorm2d)
            layers = {f"layer{i}": str(i) for i in range(1, 5)}
            self.body: nn.Module = IntermediateLayerGetter(full, layers)
        elif architecture.kind == "swin":
            self.body = Swin(
                architecture.width,
                architecture.depths,
                architecture.heads,
                architecture.window,
                architecture.first_stage,
                by_channel=architecture.by_channel,
            )
        elif architecture.kind == "convnext":
            self.body = ConvNeXt(architecture.width, architecture.depths, architecture.first_stage)
        else:
            self.body = FocalNet(
                architecture.width,
                architecture.depths,
                architecture.kernels,
                architecture.first_stage,
            )
            for module in self.body.modules():
                if isinstance(module, FocalModulation):
                    module.divides = architecture.divides

    def forward(self, pixel_values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Raw outputs of the four stages, and the encoder's input.

        The latter are the outputs from ``first_stage`` on, normalised where the backbone has output
        norms.
        """
        stages = self.body(pixel_values)
        if isinstance(stages, dict):
            stages = list(stages.values())
        outputs = []
        for index in range(self.first_stage, 4):
            norm = getattr(self.body, f"norm{index}", None)
            values = stages[index]
            if norm is not None:
                values = norm(values.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            outputs.append(values.contiguous())
        return stages, outputs
