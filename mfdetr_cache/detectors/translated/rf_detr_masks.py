"""The mask branch of RF-DETR's segmentation form."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfdetr_cache.detectors.huggingface.adapter import HuggingFaceDetector
from mfdetr_cache.detectors.names import count
from mfdetr_cache.detectors.weights import freeze, require_complete
from mfdetr_cache.errors import DetectorError
from mfdetr_cache.types import DetectorOutput

PREFIX = "segmentation_head."


class _Block(nn.Module):
    """A depthwise convolution and a layer on single cells, added to the map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        cells = self.norm(self.dwconv(values).permute(0, 2, 3, 1))
        return values + functional.gelu(self.pwconv1(cells)).permute(0, 3, 1, 2)


class _QueryBlock(nn.Module):
    """Two layers on a normed query, added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor) -> Tensor:
        added: Tensor = self.layers(self.norm_in(queries))
        return queries + added


class MaskBranch(nn.Module):
    """Masks as products of queries and cells, with the authors' parameter names.

    ``downsample`` are the pixels of the input along a side of a mask's cell. DetectorError if
    tensors of the branch are missing, have no place or another shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor], downsample: int, where: str) -> None:
        super().__init__()
        own = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
        width = tensors["class_embed.weight"].shape[1]
        inner = own.get("query_features_proj.bias", tensors["class_embed.weight"][0]).numel()
        blocks = count(own, r"blocks\.(\d+)\.")
        self.downsample = downsample
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.spatial_features_proj = nn.Conv2d(width, inner, 1)
        self.query_features_block = _QueryBlock(width)
        self.query_features_proj = nn.Linear(width, inner)
        self.bias = nn.Parameter(torch.zeros(1))
        there = self.state_dict()
        require_complete(where, there.keys() - own.keys(), own.keys() - there.keys())
        for name, value in there.items():
            if own[name].shape != value.shape:
                shapes = f"{tuple(own[name].shape)}, expected {tuple(value.shape)}"
                raise DetectorError(f"{where}: {PREFIX}{name} is {shapes}")
        self.load_state_dict(own)
        freeze(self)

    def forward(self, values: Tensor, queries: Tensor, input_hw: tuple[int, int]) -> Tensor:
        """Mask logits (B, Q, h, w) of a map (B, C, h', w') and queries (B, Q, C)."""
        size = [side // self.downsample for side in input_hw]
        values = functional.interpolate(values, size=size, mode="bilinear")
        for block in self.blocks:
            values = block(values)
        vectors = self.query_features_proj(self.query_features_block(queries))
        products = torch.einsum("bchw,bqc->bqhw", self.spatial_features_proj(values), vectors)
        return products + self.bias


class RfDetrWithMasks(HuggingFaceDetector):
    """RF-DETR with the masks that it was trained to give; their branch is never tuned."""

    branch: MaskBranch

    def own_masks(self, output: DetectorOutput, input_hw: tuple[int, int]) -> Tensor:
        """See :class:`~mfdetr_cache.detectors.protocol.MaskingDetector`."""
        name = next(m.name for m in self.spec.maps if m.role == "encoder")
        masks: Tensor = self.branch(output.maps[name], output.queries, input_hw)
        return masks
