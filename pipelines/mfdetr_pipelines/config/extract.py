from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from mfdetr_cache.coco.layouts import ANNOTATIONS, DatasetFiles, dataset_files
from mfdetr_cache.coco.options import LabelOptions
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.extraction.options import MapOptions, ViewOptions
from mfdetr_cache.options import FOLDER, Option
from mfdetr_pipelines.config.shared import (
    DatasetFolder,
    DetectorName,
    OnBadAnnotation,
    OnDevice,
    SplitName,
    WorkOptions,
)

if TYPE_CHECKING:
    from mfdetr_cache.cache.storage.open import Location


@dataclass(frozen=True, slots=True)
class ExtractConfig(OnDevice):
    """Run a frozen detector over a dataset once and keep what it saw.

    The same command goes on where a stopped one left off. The work can be divided: see --part, and
    docs/scale.md.

    Example:
        mfdetr extract --weights PekingU/rtdetr_r50vd --images val2017
        --annotations annotations/instances_val2017.json --cache val2017.zarr

    Attributes:
        weights: The detector: hub id, folder in its layout, or a checkpoint of its authors' code.
        cache: Where the cache goes: a folder such as val2017.zarr, or a URL.
        images: Folder with the images.
        annotations: COCO instances JSON of these images, or data.yaml of YOLO's layout.
        limit: Only the first N images.
        on_bad_image: What to do with an image that cannot be read: stop, or leave it out.
        force: Start although the disk looks too small.
    """

    weights: Annotated[str, Option(metavar="NAME")]
    cache: Annotated["Location", Option(metavar="CACHE")]
    images: Annotated[Path | None, FOLDER] = None
    annotations: Annotated[Path | None, ANNOTATIONS] = None
    dataset: DatasetFolder = None
    split: SplitName = None
    on_bad_annotation: OnBadAnnotation = "stop"
    detector: DetectorName = "auto"
    limit: int | None = None
    on_bad_image: Literal["stop", "skip"] = "stop"
    force: bool = False
    options: DetectorOptions = field(default_factory=DetectorOptions)
    labels: LabelOptions = field(default_factory=LabelOptions)
    maps: MapOptions = field(default_factory=MapOptions)
    views: ViewOptions = field(default_factory=ViewOptions)
    work: WorkOptions = field(default_factory=WorkOptions)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: give 1 or more images")
        self.files  # noqa: B018  refused before anything is loaded

    @property
    def files(self) -> DatasetFiles:
        """Image folder and annotation file."""
        return dataset_files(self.images, self.annotations, self.dataset, self.split)
