"""ConvNeXt block (Eq. 8): depth-wise 7x7 convolution, layer norm, FFN, layer scale, residual."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class ConvNeXtBlock(nn.Module):
    """One block over a channels-last map.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, maps: Tensor) -> Tensor:
        """Refine maps.

        Args:
            maps: Shape (B, h, w, D).

        Returns:
            Shape (B, h, w, D).
        """
        mixed = self.depthwise(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden = functional.gelu(self.linear1(self.norm(mixed)))
        refined: Tensor = maps + self.linear2(hidden)
        return refined


def init_convnext(block: ConvNeXtBlock) -> None:
    """ConvNeXt's initialisation: truncated normal weights, zero biases.

    Args:
        block: Changed in place.
    """
    for module in block.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        # Paper: 538,880 parameters leave no layer scale; a small last layer starts the block near
        # the identity instead.
        block.linear2.weight.mul_(0.1)
