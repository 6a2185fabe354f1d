"""The settings of an extraction."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mfdetr_cache.cache.locks import WHOLE, Partition
from mfdetr_cache.cache.schema import C1Mode, Compression
from mfdetr_cache.cache.storage.open import Location
from mfdetr_cache.coco.augmentation import Policy
from mfdetr_cache.detectors.options import DetectorOptions
from mfdetr_cache.extraction.cluster import Cluster
from mfdetr_cache.ops.quantisation import Preset


@dataclass(frozen=True, slots=True)
class ExtractConfig:
    """What ``mfdetr extract`` is told.

    Attributes:
        detector: Name of the detector.
        weights: Its folder, file or hub id.
        images: Image folder.
        annotations: COCO instances JSON.
        cache: Where the cache goes.
        limit: Only the first so many images.
        device: Where the detector runs.
        options: What the user chose about the detector.
        preset: How the maps are stored.
        compression: How chunks are compressed.
        c1: Keep C1 whole, as crops around matched queries, or not at all.
        roi_size: Cells of a crop, for ``roi``.
        roi_sampling_ratio: RoIAlign samples per bin, for ``roi``; 0 adapts to the box.
        views: How many augmented passes beside the plain one.
        policy: How the pictures of these are made.
        view_seed: Of the augmentation.
        on_bad_image: Stop at an unreadable image, or leave it out.
        force: Start although the disk looks too small.
        partition: Which parts of the cache this process fills.
        engine: Fill them in this process, or as tasks on a Ray cluster.
        cluster: Which cluster.
    """

    detector: str
    weights: str
    images: Path
    annotations: Path
    cache: Location
    limit: int | None = None
    device: str = "cpu"
    options: DetectorOptions = field(default_factory=DetectorOptions)
    preset: Preset = "int8"
    compression: Compression = "zstd"
    c1: C1Mode = "full"
    roi_size: int = 32
    roi_sampling_ratio: int = 0
    views: int = 0
    policy: Policy = "deformable-detr"
    view_seed: int = 0
    on_bad_image: Literal["stop", "skip"] = "stop"
    force: bool = False
    partition: Partition = WHOLE
    engine: Literal["local", "ray"] = "local"
    cluster: Cluster = field(default_factory=Cluster)
