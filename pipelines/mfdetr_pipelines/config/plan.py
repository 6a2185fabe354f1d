from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mfdetr_cache.coco.layouts import ANNOTATIONS
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.extraction.options import MapOptions, ViewOptions
from mfdetr_cache.options import FOLDER, Built, Only, Option
from mfdetr_cache.training.recipes import Recipe, fast
from mfdetr_pipelines.config.shared import DetectorName, OnBadAnnotation, OnDevice
from mfdetr_pipelines.config.training import RecipeOptions


@dataclass(frozen=True, slots=True)
class PlannedRecipe(RecipeOptions):
    """The training that is planned."""


@dataclass(frozen=True, slots=True)
class PlanConfig(OnDevice):
    """Tell what a cache will cost before it is made: bytes, hours, and when it pays.

    Example:
        mfdetr plan --weights PekingU/rtdetr_r50vd
        --annotations annotations/instances_train2017.json --images train2017 --disk /data

    Attributes:
        weights: The detector: folder, hub id or checkpoint.
        annotations: COCO instances JSON of the dataset.
        images: Folder of images to time the detector on. Random images if omitted, whose features
            compress less.
        disk: Where the cache would go; this folder if omitted.
        sample: Images to measure on.
        disk_seconds: Seconds to write; longer than the drive's write cache lasts.
        epochs: Length of one training; by default the recipe's.
    """

    weights: Annotated[str, Option(metavar="NAME")]
    annotations: Annotated[Path, ANNOTATIONS]
    detector: DetectorName = "auto"
    images: Annotated[Path | None, FOLDER] = None
    on_bad_annotation: OnBadAnnotation = "stop"
    disk: Annotated[Path | None, Option(metavar="FOLDER")] = None
    sample: int = 8
    disk_seconds: float = 10.0
    epochs: float | None = None
    recipe: Annotated[Recipe, Built(PlannedRecipe), Only("recipe")] = field(default_factory=fast)
    options: Annotated[
        DetectorOptions, Only("num_queries", "encoder_layer", "input_size", "prompt")
    ] = field(default_factory=DetectorOptions)
    maps: Annotated[MapOptions, Only("c1", "roi_size")] = field(default_factory=MapOptions)
    views: Annotated[ViewOptions, Only("count")] = field(default_factory=ViewOptions)

    def __post_init__(self) -> None:
        if self.sample < 1 or (self.epochs is not None and self.epochs <= 0):
            raise ConfigError("--sample and --epochs must be above 0")
