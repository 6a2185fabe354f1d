"""Parameters and multiply-adds of a mask network, counted while its modules run.

The rule is the one under which the paper's columns agree with its architecture: a multiply-add of
a linear layer, convolution, attention or dot product counts one, bilinear up-sampling 4 per output
element, RoIAlign 17, and every residual, layer-scale or fusion step 1. Biases, activations,
norms, softmax and the sampling of deformable attention are not counted. One image with 100 boxes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mfdetr_cache.head.batch import MapGroup
from mfdetr_cache.head.blocks.convnext import ConvNeXtBlock
from mfdetr_cache.head.blocks.deformable import DeformableLayer, FfnBlock
from mfdetr_cache.head.blocks.swin import SwinBlock
from mfdetr_cache.head.build import build_head
from mfdetr_cache.head.config import HeadConfig
from mfdetr_cache.head.fine_mask import FineLayer, FineMask
from mfdetr_cache.head.fusion import FeatureFusion
from mfdetr_cache.head.image_encoder import DeformableImageEncoder
from mfdetr_cache.head.mask_head import MaskHead
from mfdetr_cache.head.point_mask import PointMask
from mfdetr_cache.head.query_encoder import BoxToObject
from mfdetr_cache.head.refinement import Refinement
from mfdetr_cache.head.whole_image import WholeImageHead
from mfdetr_cache.types import DetectorSpec, MapSpec

BOXES = 100
# Its maps have the mean sizes of COCO val2017 at a shorter side of 800: 56,200 cells at stride 4,
# 14,100 at stride 8 and 18,784 tokens in four levels, each within 0.9 % of the mean.
MEAN_COCO_INPUT_HW = (800, 1124)

# Element-wise steps per output element: residuals, q scaling (Swin), layer scale (ConvNeXt).
_STEPS: dict[type[nn.Module], int] = {
    DeformableLayer: 2,
    SwinBlock: 3,
    ConvNeXtBlock: 2,
    FfnBlock: 1,
    FineLayer: 1,
}


@dataclass(frozen=True, slots=True)
class HeadCost:
    """Cost of a mask network for one image with 100 boxes.

    Attributes:
        macs: Multiply-adds by the paper's rule, of the network as the paper describes it.
        executed_macs: By the same rule, of the network as implemented: no unused token in the last
            layer of the image encoder, and box-to-object attention with folded projections.
    """

    parameters: int
    macs: int
    executed_macs: int


# Queries, channels of C1 and strides of the encoder's levels.
_PAPER_DETECTORS = {
    "h-detr-r50": (300, 256, (8, 16, 32, 64)),
    "h-detr-swin-l": (300, 192, (8, 16, 32, 64)),
    "dino-focalnet-l": (900, 192, (4, 8, 16, 32, 64)),
}


def paper_detector(name: str = "h-detr-r50") -> DetectorSpec:
    """A detector of the paper, without weights: maps, widths and outputs."""
    num_queries, c1_channels, strides = _PAPER_DETECTORS[name]
    levels = [MapSpec(f"encoder{s}", "encoder", s, 256, "encoder layer 4") for s in strides]
    return DetectorSpec(
        name=name,
        weights_sha256="",
        num_queries=num_queries,
        query_dim=256,
        num_labels=91,
        score_function="sigmoid",
        label_names=tuple(f"LABEL_{i}" for i in range(91)),
        maps=(MapSpec("c1", "c1", 4, c1_channels, "layer1"), *levels),
        encoder_level_embed=((0.0,) * 256,) * len(strides),
    )


def head_cost(
    config: HeadConfig, spec: DetectorSpec, input_hw: tuple[int, int] = MEAN_COCO_INPUT_HW
) -> HeadCost:
    """Count the cost of a head on meta tensors, without computing anything."""
    with torch.device("meta"):
        head = build_head(config, spec).eval()
        parameters = sum(p.numel() for p in head.parameters() if p.requires_grad)
        executed = _count(head, spec, input_hw)
        for module in head.modules():
            if isinstance(module, DeformableImageEncoder):
                module.every_token = True
            elif isinstance(module, BoxToObject):
                module.folded = False
        macs = _count(head, spec, input_hw)
    return HeadCost(parameters, macs, executed)


@torch.no_grad()
def _count(head: MaskHead, spec: DetectorSpec, input_hw: tuple[int, int]) -> int:
    maps = {
        m.name: torch.empty(1, m.channels, *(-(-side // m.stride) for side in input_hw))
        for m in spec.maps
    }
    group = MapGroup(maps, input_hw, (0,))
    queries, rois = torch.empty(BOXES, spec.query_dim), torch.empty(BOXES, 5)
    image = torch.zeros(BOXES, dtype=torch.long)
    extra = [0]
    counter = FlopCounterMode(display=False, custom_mapping=_SAMPLING)
    with counter, _element_wise(head, extra):
        fused = head.fuse(group)
        if isinstance(head, WholeImageHead):
            head.decode_image(fused, queries)
        elif isinstance(head.predictor, Refinement):
            # ISTR's stages without their boxes, which are not known without weights.
            queries = head.map_query(queries)
            for stage in head.predictor:
                queries, _, codes = stage(queries, head.align(fused, rois), image)
            head.predictor.codec.decode(codes)
        else:
            head.decode(head.align(fused, rois), queries, image)
    # The counter speaks of flops, two for a multiply-add.
    return counter.get_total_flops() // 2 + extra[0]


def _each(macs: int) -> Any:  # noqa: ANN401
    return lambda *_, out_shape, **__: 2 * macs * math.prod(out_shape)


_SAMPLING = {
    torch.ops.aten.upsample_bilinear2d: _each(4),
    torch.ops.torchvision.roi_align: _each(17),
}


@contextmanager
def _element_wise(head: MaskHead, total: list[int]) -> Iterator[None]:
    def steps_of(steps: int) -> Any:  # noqa: ANN401
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            total[0] += steps * output.numel()

        return hook

    def fusion(_module: nn.Module, args: tuple[Tensor | None, ...], output: Tensor) -> None:
        total[0] += output.numel() if args[0] is not None else 0

    def correction(module: FineMask, _args: object, output: Tensor) -> None:
        # Detail and context are added in every channel of a cell, and the two logits.
        total[0] += (module.detail.out_features + 1) * output.numel()

    def points(module: PointMask, args: tuple[Tensor, Tensor], _output: Tensor) -> None:
        # Bilinear values of the features and of the coarse logit.
        regions, side, _, width = args[1].shape
        count = sum(n for _, n in module.subdivisions(int(args[0].shape[1]), side))
        total[0] += 4 * regions * count * (width + 1)

    hooks: dict[type[nn.Module], Any] = {
        FeatureFusion: fusion,
        FineMask: correction,
        PointMask: points,
    }
    hooks |= {kind: steps_of(steps) for kind, steps in _STEPS.items()}
    handles = [
        module.register_forward_hook(hooks[type(module)])
        for module in head.modules()
        if type(module) in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
