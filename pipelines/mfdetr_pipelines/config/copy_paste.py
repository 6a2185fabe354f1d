"""What ``mfdetr copy-paste`` is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import FILE, FOLDER, Option


@dataclass(frozen=True, slots=True)
class CopyPasteConfig:
    """Make a larger training set: every image, and copies with objects of others on it.

    For some hundred images. What comes out is a dataset in COCO format, for mfdetr extract.

    Example:
        mfdetr copy-paste --images coco/train2017 --copies 6
        --annotations coco/annotations/instances_train2017.json --out pasted

    Attributes:
        images: Image folder of the training split.
        annotations: Its COCO instances JSON.
        out: New folder for images and annotations.
        copies: Images to make of every image, beside itself.
        seed: Seed of what is pasted, and where.
    """

    images: Annotated[Path, FOLDER]
    annotations: Annotated[Path, FILE]
    out: Annotated[Path, Option(metavar="FOLDER")]
    copies: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.copies < 1 or self.seed < 0:
            raise ConfigError(
                f"--copies {self.copies} --seed {self.seed}: give 1 or more copies and a seed "
                "that is not negative"
            )
