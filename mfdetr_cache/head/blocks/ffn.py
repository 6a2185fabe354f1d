"""FFN block: a deformable layer without its attention, which mixes no cells."""

from torch import Tensor, nn
from torch.nn import functional


class FfnBlock(nn.Module):
    """FFN four times as wide with GELU, residual and norm, over channels-last maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Refine maps of shape (B, h, w, D), each cell by itself."""
        refined: Tensor = self.norm(maps + self.linear2(functional.gelu(self.linear1(maps))))
        return refined
