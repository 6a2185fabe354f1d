"""What a user may choose about what an extraction keeps."""

from dataclasses import dataclass
from typing import Annotated

from mfdetr_cache.choices import C1Mode, Compression, Policy, Preset
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import Option


@dataclass(frozen=True, slots=True)
class MapOptions:
    """How the maps are stored.

    Attributes:
        preset: Bits per value, from large to small: fp16, int8, int8-small or int4.
        compression: Compress chunks (zstd), or leave them as they are (raw).
        c1: The stride-4 map: whole; as crops around matched queries, for training only; or none.
        roi_size: Cells along a side of a crop, a multiple of 8; for --c1 roi.
        roi_sampling_ratio: RoIAlign samples per bin, for --c1 roi; 0 adapts to the box.
    """

    preset: Annotated[Preset, Option("--dtype", metavar="PRESET")] = "int8"
    compression: Compression = "zstd"
    c1: C1Mode = "full"
    roi_size: int = 32
    roi_sampling_ratio: int = 0

    def __post_init__(self) -> None:
        if self.roi_size < 8 or self.roi_size % 8 or self.roi_sampling_ratio < 0:
            raise ConfigError("--roi-size must be a multiple of 8, --roi-sampling-ratio 0 or more")


@dataclass(frozen=True, slots=True)
class ViewOptions:
    """Augmented views.

    Attributes:
        count: Augmented passes per image beside the plain one; for training.
        policy: deformable-detr: flip, multi-scale resize and crop; or large-scale-jitter
            (Table 11).
        seed: Seed of the augmentation.
    """

    count: Annotated[int, Option("--views")] = 0
    policy: Annotated[Policy, Option("--view-policy", metavar="POLICY")] = "deformable-detr"
    seed: Annotated[int, Option("--view-seed")] = 0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"--views {self.count}: give 0 or more augmented views")
