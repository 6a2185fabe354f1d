"""ConvNeXt block (Eq. 8): depth-wise 7x7 convolution, layer norm, FFN, layer scale, residual."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# As in ConvNeXt (Liu et al., 2022).
_INITIAL_SCALE = 1e-6


class ConvNeXtBlock(nn.Module):
    """One block over a channels-last map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, maps: Tensor) -> Tensor:
        """Refine maps of shape (B, h, w, D)."""
        mixed = self.depthwise(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden = functional.gelu(self.linear1(self.norm(mixed)))
        refined: Tensor = maps + self.scale * self.linear2(hidden)
        return refined

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # noqa: ANN401
        # Heads from before there was a scale.
        state_dict.setdefault(prefix + "scale", torch.ones_like(self.scale))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def init_convnext(block: ConvNeXtBlock) -> None:
    """Initialise in place as ConvNeXt: truncated normal, zero biases, near the identity."""
    for module in block.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    # Paper: its multiply-adds count a product per element beside the residual, which is the layer
    # scale, and its parameters have room for it.
    nn.init.constant_(block.scale, _INITIAL_SCALE)
