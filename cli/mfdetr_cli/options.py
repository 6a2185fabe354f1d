"""Options that several commands share, so that their help cannot drift apart."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from mfdetr_pipelines.config.shared import parse_size

from mfdetr_cache.errors import ConfigError
from mfdetr_cache.training.recipes import RECIPES

if TYPE_CHECKING:
    from mfdetr_cache.cache.storage.protocol import Storage
    from mfdetr_cache.choices import Tracker


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


BatchSizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Images per step instead of the recipe's; auto keeps the recipe's and computes a step "
        "in as many micro-batches as the GPU's memory asks for.",
    ),
]
TrackOption = Annotated[
    str,
    typer.Option(
        help="Where numbers go beside metrics.jsonl: tensorboard, wandb, mlflow, several with "
        "commas, or none."
    ),
]


def parse_trackers(text: str) -> "tuple[Tracker, ...]":
    """``--track`` as names; whether they are known is seen later.

    Args:
        text: As typed.

    Returns:
        The names; nothing for ``none``.
    """
    return tuple(t.strip() for t in text.split(",") if t.strip() not in ("", "none"))  # type: ignore[misc]


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
