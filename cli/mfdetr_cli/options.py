"""Options that several commands share, so that their help cannot drift apart."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mfdetr_cache.errors import ConfigError
from mfdetr_cache.training.recipes import RECIPES

if TYPE_CHECKING:
    from mfdetr_cache.cache.locks import Partition
    from mfdetr_cache.cache.storage.protocol import Storage


def _writable(path: Path | None) -> Path | None:
    """Refuse a place for the result before hours of work, not after them."""
    if path is not None:
        above = next(p for p in path.absolute().parents if p.exists())
        if path.is_dir():
            raise ConfigError(f"--json {path} is a folder; name a file")
        if not above.is_dir() or not os.access(path if path.exists() else above, os.W_OK):
            raise ConfigError(f"--json {path} cannot be written there")
    return path


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=_writable,
        help="Write the result to this file too, as JSON.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")
]
CacheArgument = Annotated[str, typer.Argument(help="The cache: a folder, or a URL.")]
RecipeOption = Annotated[str, typer.Option(help=f"One of: {', '.join(RECIPES)}.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of the recipe."),
]
MaxStepsOption = Annotated[
    int | None, typer.Option(help="Train for N steps; the schedule is fitted to them.")
]
EpochsOption = Annotated[
    float | None, typer.Option(help="Train for N epochs; the schedule is fitted to them.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
LocalCacheOption = Annotated[
    Path | None,
    typer.Option(help="Keep what is read from an object store in this folder."),
]
LocalCacheSizeOption = Annotated[
    str, typer.Option(metavar="SIZE", help="Most bytes kept there, such as 200GB.")
]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """A number of bytes as people write it.

    Args:
        text: Such as ``200GB`` or ``1.5 TB``.

    Returns:
        Bytes.

    Raises:
        ConfigError: If it is no size.

    Examples:
        >>> parse_size("1.5 GB")
        1500000000
    """
    plain = text.strip().upper()
    unit = next((u for u in ("KB", "MB", "GB", "TB", "B") if plain.endswith(u)), "")
    try:
        return int(float(plain.removesuffix(unit)) * _UNITS[unit or "B"])
    except ValueError:
        raise ConfigError(f"{text!r} is no size; write 200GB, 500MB or 2TB") from None


def storage_at(location: str, local_cache: Path | None, local_cache_size: str) -> "Storage":
    """Where a cache is, with a local folder in front of an object store if one is asked for.

    Args:
        location: Folder or URL.
        local_cache: The local folder.
        local_cache_size: Its size.

    Returns:
        The storage.
    """
    from mfdetr_cache.cache.storage.mirror import MirroredStorage
    from mfdetr_cache.cache.storage.open import open_storage

    storage = open_storage(location)
    if local_cache is None or storage.folder is not None:
        return storage
    return MirroredStorage(storage, local_cache, parse_size(local_cache_size))


def parse_partition(text: str | None) -> "Partition":
    """``--part K/N``, or what torchrun or a Slurm array says.

    Args:
        text: As typed; None looks at the environment.

    Returns:
        The partition.

    Raises:
        ConfigError: If it cannot be understood.
    """
    from mfdetr_cache.cache.locks import Partition

    found = os.environ.get
    if text is None:
        if int(found("WORLD_SIZE", "1")) > 1:
            return Partition(int(found("RANK", "0")) + 1, int(found("WORLD_SIZE", "1")))
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            first = int(found("SLURM_ARRAY_TASK_MIN", "0"))
            step = int(found("SLURM_ARRAY_TASK_STEP", "1"))
            number = (int(found("SLURM_ARRAY_TASK_ID", "0")) - first) // step + 1
            return Partition(number, int(found("SLURM_ARRAY_TASK_COUNT", "1")))
        return Partition()
    which, _, count = text.partition("/")
    if not which.isdigit() or not count.isdigit():
        raise ConfigError(f"--part {text!r}: write K/N, such as --part 3/16")
    return Partition(int(which), int(count))


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """``key=value`` texts as a dictionary.

    Args:
        assignments: As typed.

    Returns:
        Key to value.

    Raises:
        ConfigError: If one has no ``=``.
    """
    parsed: dict[str, str] = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {assignment!r}: write key=value, such as --set lr=3e-4")
        parsed[key.strip()] = value.strip()
    return parsed


def parse_batch_size(text: str | None) -> int | Literal["auto"] | None:
    """``--batch-size`` as a number or ``auto``.

    Args:
        text: As typed; None if it was not.

    Returns:
        The number, ``auto``, or None.

    Raises:
        ConfigError: If it is neither.
    """
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    if not text.isdigit():
        raise ConfigError(f"--batch-size {text!r}: give a number, or auto")
    return int(text)
