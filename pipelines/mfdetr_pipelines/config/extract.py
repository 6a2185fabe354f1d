"""What ``mfdetr extract`` is told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.extraction.options import MapOptions, ViewOptions
from mfdetr_cache.options import FILE, FOLDER, Option
from mfdetr_pipelines.config.shared import OnDevice, WorkOptions

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
        images: Folder with the images.
        annotations: COCO instances JSON of these images.
        cache: Where the cache goes: a folder such as val2017.zarr, or a URL.
        detector: A name that mfdetr detectors lists; by default what the weights say.
        limit: Only the first N images.
        on_bad_image: What to do with an image that cannot be read: stop, or leave it out.
        force: Start although the disk looks too small.
        options: What the user chose about the detector.
        maps: How the maps are stored.
        views: Augmented passes.
        work: Which share of the work this process does, or where else it is done.
    """

    weights: Annotated[str, Option(metavar="NAME")]
    images: Annotated[Path, FOLDER]
    annotations: Annotated[Path, FILE]
    cache: Annotated["Location", Option(metavar="CACHE")]
    detector: Annotated[str, Option(metavar="NAME")] = "auto"
    limit: int | None = None
    on_bad_image: Literal["stop", "skip"] = "stop"
    force: bool = False
    options: DetectorOptions = field(default_factory=DetectorOptions)
    maps: MapOptions = field(default_factory=MapOptions)
    views: ViewOptions = field(default_factory=ViewOptions)
    work: WorkOptions = field(default_factory=WorkOptions)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: give 1 or more images")
