from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import FOLDER, Option
from mfdetr_pipelines.config.shared import DetectorName

# A token of the coarsest usual level.
_LEAST_INPUT = 32


def parse_size_hw(text: str) -> tuple[int, int]:
    """``HxW`` as height and width in pixels."""
    height, _, width = text.lower().partition("x")
    if not height.isdigit() or not width.isdigit():
        raise ValueError("write HxW, such as 640x640")
    return int(height), int(width)


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """Write a head, or detector and head together, as ONNX, checked against torch.

    The number of regions is free, the input size is fixed, one image at a time.

    Example:
        mfdetr export --head runs/fast --weights PekingU/rtdetr_r50vd --out model.onnx

    Attributes:
        head: Run folder of train-head.
        out: The ONNX file.
        input_hw: Network input in pixels, height first; the graph is for this size.
        weights: Put the detector into the graph too: its weights.
        top_k: With the detector: masks for the N queries of highest class score.
    """

    head: Annotated[Path, FOLDER]
    out: Annotated[Path, Option(metavar="FILE")] = Path("head.onnx")
    input_hw: Annotated[
        tuple[int, int] | None, Option("--input-size", metavar="HxW", parse=parse_size_hw)
    ] = None
    weights: Annotated[str | None, Option(metavar="NAME")] = None
    detector: DetectorName = "auto"
    top_k: int = 100

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"--top-k {self.top_k}: give 1 or more queries")
        if self.input_hw is not None and min(self.input_hw) < _LEAST_INPUT:
            height, width = self.input_hw
            raise ConfigError(
                f"--input-size {height}x{width}: give {_LEAST_INPUT} or more each way"
            )
