"""Manifests: the commit marks of a cache, one per sealed part."""

import json
from pathlib import Path
from typing import Any

from mfdetr_cache.cache.schema import BASE_VIEW
from mfdetr_cache.errors import CacheError


def manifest_path(path: Path, part: int) -> Path:
    """Where the manifest of a part is.

    Args:
        path: The cache.
        part: Number of the part.

    Returns:
        Path of a JSON file.
    """
    return status_folder(path) / "manifest" / f"{part:06d}.json"


def status_folder(path: Path) -> Path:
    """Folder of the status array, where manifests and the writer's lock are.

    Zarr readers that list a group do not look inside arrays, so files of ours that are no Zarr
    nodes disturb nobody there.

    Args:
        path: The cache.

    Returns:
        The folder.
    """
    return path / "views" / BASE_VIEW / "status"


def read_manifest(path: Path, part: int) -> dict[str, Any] | None:
    """The manifest of a part.

    Args:
        path: The cache.
        part: Number of the part.

    Returns:
        Its content, or None if the part was never sealed.

    Raises:
        CacheError: If it is there but damaged.
    """
    file = manifest_path(path, part)
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise CacheError(
            f"{file} is damaged; delete this file and run the same extract again"
        ) from None
    return content


def part_is_whole(path: Path, part: int) -> bool:
    """Whether a part was sealed and its files still have the size they were sealed with.

    Args:
        path: The cache.
        part: Number of the part.

    Returns:
        True if nothing of it has to be extracted again.
    """
    manifest = read_manifest(path, part)
    if manifest is None:
        return False
    for key, expected in manifest["files"].items():
        try:
            if (path / key).stat().st_size != expected["bytes"]:
                return False
        except FileNotFoundError:
            return False
    return True
