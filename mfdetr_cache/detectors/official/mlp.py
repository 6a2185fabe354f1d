"""The MLP of Swin and FocalNet blocks."""

from torch import Tensor, nn
from torch.nn import functional


class GeluMlp(nn.Module):
    """Linear to four times the width, exact GELU, linear back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, values: Tensor) -> Tensor:
        """Shape (..., C) to the same."""
        result: Tensor = self.fc2(functional.gelu(self.fc1(values)))
        return result
