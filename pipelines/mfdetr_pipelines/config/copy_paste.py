from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mfdetr_cache.coco.layouts import ANNOTATIONS, DatasetFiles, dataset_files
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import FOLDER, Option
from mfdetr_pipelines.config.shared import DatasetFolder, OnBadAnnotation, SplitName


@dataclass(frozen=True, slots=True)
class CopyPasteConfig:
    """Make a larger training set: every image, and copies with objects of others on it.

    For some hundred images. What comes out is a dataset in COCO format, for mfdetr extract.

    Example:
        mfdetr copy-paste --images coco/train2017 --copies 6
        --annotations coco/annotations/instances_train2017.json --out pasted

    Attributes:
        out: New folder for images and annotations.
        images: Image folder of the training split.
        annotations: Its COCO instances JSON.
        copies: Images to make of every image, beside itself.
        seed: Seed of what is pasted, and where.
    """

    out: Annotated[Path, Option(metavar="FOLDER")]
    images: Annotated[Path | None, FOLDER] = None
    annotations: Annotated[Path | None, ANNOTATIONS] = None
    dataset: DatasetFolder = None
    split: SplitName = None
    on_bad_annotation: OnBadAnnotation = "stop"
    copies: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.copies < 1 or self.seed < 0:
            raise ConfigError(
                f"--copies {self.copies} --seed {self.seed}: give 1 or more copies and a seed "
                "that is not negative"
            )
        self.files  # noqa: B018  refused before anything is read

    @property
    def files(self) -> DatasetFiles:
        """Image folder and annotation file."""
        return dataset_files(self.images, self.annotations, self.dataset, self.split)
