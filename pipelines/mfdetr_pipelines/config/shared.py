"""Options and groups of options that several commands have."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from mfdetr_cache.cache.partition import Partition, parse_partition
from mfdetr_cache.choices import OnBad
from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import (
    CACHE,
    FOLDER,
    Option,
    existing_cache,
    existing_folder,
    writable_file,
)

if TYPE_CHECKING:
    from mfdetr_cache.cache.storage.open import Location

# Options that several commands have alike, each with its help.
CacheArgument = Annotated[
    "Location",
    Option("CACHE", "CACHE", "The cache: a folder, or a URL.", existing_cache),
]
CacheOption = Annotated["Location", CACHE]
OptionalCache = Annotated["Location | None", CACHE]
DetectorName = Annotated[
    str,
    Option(
        metavar="NAME",
        help="A name that mfdetr detectors lists; by default what the weights say.",
    ),
]
DatasetFolder = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        help="Folder of a dataset in the layout of COCO, Roboflow or YOLO, in place of --images "
        "and --annotations.",
        parse=existing_folder,
    ),
]
SplitName = Annotated[
    str | None, Option(metavar="NAME", help="Split of --dataset, such as train or val2017.")
]
OnBadAnnotation = Annotated[
    OnBad,
    Option(help="What to do with an annotation that cannot be used: stop, or leave it out."),
]


@dataclass(frozen=True, slots=True)
class Output:
    """What every command has.

    Attributes:
        json: Write the result to this file too, as JSON.
    """

    json: Annotated[Path | None, Option(metavar="FILE", parse=writable_file)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDevice:
    """A command that computes on a device.

    Attributes:
        device: cpu, cuda, cuda:N, or auto: a GPU if there is one.
    """

    device: Annotated[str, Option(metavar="NAME")] = "auto"


@dataclass(frozen=True, slots=True)
class WorkOptions:
    """Several processes or machines.

    Attributes:
        part: Fill every N-th part of the cache only; several such processes fill it together.
            Without it, torchrun's or a Slurm array's variables decide.
        engine: Here, or as tasks on a Ray cluster.
        address: Ray cluster, such as auto or ray://host:10001.
        workers: Processes on this machine (0 for one, and for up to six of a long extraction on a
            GPU), or Ray tasks at a time (0 for one per GPU, or per two CPUs).
    """

    part: Annotated[Partition | None, Option(metavar="K/N", parse=parse_partition)] = None
    engine: Literal["local", "ray"] = "local"
    address: Annotated[str | None, Option(metavar="URL")] = None
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: give 1 or more, or 0 for the usual")


@dataclass(frozen=True, slots=True)
class LiveDetector:
    """The detector, run again.

    Attributes:
        weights: The detector the cache was made with.
        images: Folder with the images of the cache.
    """

    weights: Annotated[str | None, Option(metavar="NAME")] = None
    images: Annotated[Path | None, FOLDER] = None

    def __post_init__(self) -> None:
        if (self.weights is None) != (self.images is None):
            raise ConfigError("--weights and --images go together: they run the detector again")


@dataclass(frozen=True, slots=True)
class LocalCache:
    """Caches in an object store.

    Attributes:
        folder: Keep what is read from an object store in this folder.
        size: Most bytes kept there, such as 200GB.
    """

    folder: Annotated[Path | None, Option("--local-cache", metavar="FOLDER")] = None
    size: Annotated[str, Option("--local-cache-size", metavar="SIZE")] = "100GB"

    def __post_init__(self) -> None:
        parse_size(self.size)

    def before(self, location: "Location") -> "Location":
        """A cache behind the local folder, where one is given and the cache is not local itself."""
        from mfdetr_cache.cache.storage.mirror import MirroredStorage
        from mfdetr_cache.cache.storage.open import open_storage

        storage = open_storage(location)
        if self.folder is None or storage.folder is not None:
            return storage
        return MirroredStorage(storage, self.folder, parse_size(self.size))


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}


def parse_size(text: str) -> int:
    """A number of bytes as people write it; ConfigError if it is no size.

    Examples:
        >>> parse_size("1.5 GB")
        1500000000
    """
    plain = text.strip().upper()
    unit = next((u for u in _UNITS if plain.endswith(u)), "")
    try:
        size = int(float(plain.removesuffix(unit)) * _UNITS[unit or "B"])
    except (ValueError, OverflowError):  # infinity is no number of bytes
        size = 0
    if size < 1:
        raise ConfigError(f"{text!r} is no size; write 200GB, 500MB or 2TB")
    return size
