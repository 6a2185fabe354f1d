"""What ``mfdetr demo`` and ``mfdetr detectors`` are told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mfdetr_cache.options import Option


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """Go the whole way on a drawn dataset: extract, train, evaluate, draw. Needs no network.

    Example:
        mfdetr demo --out mfdetr-demo

    Attributes:
        out: New folder for data, caches, head and images.
    """

    out: Annotated[Path, Option(metavar="FOLDER")] = Path("mfdetr-demo")


@dataclass(frozen=True, slots=True)
class DetectorsConfig:
    """List the detectors that can be frozen.

    Example:
        mfdetr detectors
    """
