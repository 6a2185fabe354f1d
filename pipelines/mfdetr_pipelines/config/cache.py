"""What the commands of ``mfdetr cache`` are told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mfdetr_cache.coco.layouts import ANNOTATIONS
from mfdetr_cache.coco.options import LabelOptions
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import FOLDER, Option, existing_cache
from mfdetr_pipelines.config.shared import (
    CacheArgument,
    LiveDetector,
    OnBadAnnotation,
    OnDevice,
    OptionalCache,
)


@dataclass(frozen=True, slots=True)
class InfoConfig:
    """Tell what a cache is, what made it, how large it is and whether it is whole.

    Example:
        mfdetr cache info val2017.zarr
    """

    cache: CacheArgument


@dataclass(frozen=True, slots=True)
class VerifyConfig(OnDevice):
    """Check that a cache is whole. Exit code 1 names what is broken; nothing is changed.

    Looks at sizes and shard indexes, with --full at every checksum, with --live at the detector.

    Example:
        mfdetr cache verify val2017.zarr --full

    Attributes:
        full: Read every byte and compare its checksum.
        live: Run the detector again on N images and compare.
    """

    cache: CacheArgument
    full: bool = False
    live: int = 0
    detector: LiveDetector = field(default_factory=LiveDetector)


@dataclass(frozen=True, slots=True)
class ViewConfig:
    """Draw a page of what is in a cache: detections, maps as colours, histograms, sizes.

    Example:
        mfdetr cache view val2017.zarr --images val2017 --out val2017.html

    Attributes:
        out: The page.
        images: Folder with the images of the cache. Boxes are drawn on grey if omitted.
        count: How many images.
    """

    cache: CacheArgument
    out: Annotated[Path, Option(metavar="FILE")] = Path("cache.html")
    images: Annotated[Path | None, FOLDER] = None
    count: int = 6

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--count {self.count}: give 1 or more")


@dataclass(frozen=True, slots=True)
class FinishConfig:
    """Say whether a cache that several processes fill is whole, and which parts are missing.

    Exit code 1 names them. When nothing is missing, shows the box AP of what is cached, as extract
    does. Parts need no merging: each is whole from the moment its manifest is there.

    Example:
        mfdetr cache finish train2017.zarr
    """

    cache: CacheArgument


@dataclass(frozen=True, slots=True)
class RepairConfig(OnDevice):
    """Extract again what is broken or missing, and nothing else.

    Example:
        mfdetr cache repair val2017.zarr --weights PekingU/rtdetr_r50vd --images val2017
        --annotations annotations/instances_val2017.json

    Attributes:
        weights: The detector it was made with.
        images: Its image folder.
        annotations: Its annotation file.
    """

    cache: CacheArgument
    weights: Annotated[str, Option(metavar="NAME")]
    images: Annotated[Path, FOLDER]
    annotations: Annotated[Path, ANNOTATIONS]


@dataclass(frozen=True, slots=True)
class RelabelConfig(OnDevice):
    """Put new annotations beside the features of a cache; nothing is extracted again.

    Earlier versions stay: CACHE@N reads version N, CACHE the newest. A cache that holds C1 as crops
    needs the detector for those that are not there yet.

    Example:
        mfdetr cache relabel train2017.zarr --annotations better_masks.json

    Attributes:
        annotations: Annotation file of the same images.
    """

    cache: CacheArgument
    annotations: Annotated[Path, ANNOTATIONS]
    on_bad_annotation: OnBadAnnotation = "stop"
    labels: LabelOptions = field(default_factory=LabelOptions)
    detector: LiveDetector = field(default_factory=LiveDetector)


@dataclass(frozen=True, slots=True)
class CertifyConfig(OnDevice):
    """Measure what a preset costs in mask AP, and keep the result in the cache.

    Compares with a cache of finer features, or with the detector itself.

    Example:
        mfdetr cache certify val-int8.zarr --head runs/paper --reference val-fp16.zarr

    Attributes:
        head: Run folder of a trained head.
        reference: A cache of the same images with finer features.
        samples: Bootstrap samples.
    """

    cache: CacheArgument
    head: Annotated[Path, FOLDER]
    reference: OptionalCache = None
    samples: int = 1000
    detector: LiveDetector = field(default_factory=LiveDetector)


@dataclass(frozen=True, slots=True)
class SuggestConfig(OnDevice):
    """Name the images whose masks are most worth drawing next.

    A head looks at the images that lack masks. First come those whose masks it is least sure of,
    spread over the categories; see docs/few-masks.md.

    Example:
        mfdetr cache suggest train2017.zarr --head runs/first --count 20

    Attributes:
        head: Run folder of a trained head.
        count: How many images.
        threshold: Lowest class score of the objects that are looked at.
    """

    cache: CacheArgument
    head: Annotated[Path, FOLDER]
    count: int = 20
    threshold: Annotated[float, Option(takes_zero=True)] = 0.3

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--count {self.count}: give 1 or more")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"--threshold {self.threshold:g}: class scores are from 0 to 1")


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """Measure how fast a cache is read on this disk, beside a plain read of the same bytes.

    Example:
        mfdetr cache bench train2017.zarr

    Attributes:
        images: How many random images are read.
    """

    cache: Annotated[Path | str, Option("CACHE", "CACHE", "The cache: a folder.", existing_cache)]
    images: int = 64
