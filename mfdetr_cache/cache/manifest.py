"""Manifests: the commit marks of a cache, one per sealed part."""

import json
from pathlib import Path
from typing import Any

from mfdetr_cache.cache.schema import BASE_VIEW, Part
from mfdetr_cache.errors import MEND, CacheError


def manifest_path(path: Path, part: Part) -> Path:
    """Where the manifest of a part is.

    Args:
        path: The cache.
        part: The part.

    Returns:
        Path of a JSON file.
    """
    return status_folder(path, part.view) / "manifest" / f"{part.number:06d}.json"


def status_folder(path: Path, view: str = BASE_VIEW) -> Path:
    """Folder of a view's status array, where its manifests are; the writer's lock is in base's.

    Zarr readers that list a group do not look inside arrays, so files of ours that are no Zarr
    nodes disturb nobody there.

    Args:
        path: The cache.
        view: Name of the view.

    Returns:
        The folder.
    """
    return path / "views" / view / "status"


def certificates_folder(path: Path) -> Path:
    """Where a cache keeps what was measured about its preset.

    Args:
        path: The cache.

    Returns:
        A folder, perhaps absent.
    """
    return status_folder(path) / "certificates"


def foundation_path(path: Path) -> Path:
    """Where the sizes and checksums of everything written at creation are kept.

    Args:
        path: The cache.

    Returns:
        Path of a JSON file.
    """
    return status_folder(path) / "manifest" / "foundation.json"


def read_foundation(path: Path) -> dict[str, dict[str, int]]:
    """Size and CRC-32C of every file written at creation, by store key.

    Args:
        path: The cache.

    Returns:
        Key to ``bytes`` and ``crc32c``.

    Raises:
        CacheError: If it is missing or damaged.
    """
    file = foundation_path(path)
    try:
        content: dict[str, dict[str, int]] = json.loads(file.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CacheError(f"{file} is missing or damaged; {MEND}") from None
    return content


def read_manifest(path: Path, part: Part) -> dict[str, Any] | None:
    """The manifest of a part.

    Args:
        path: The cache.
        part: The part.

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
        raise CacheError(f"{file} is damaged; {MEND}") from None
    return content


def part_is_whole(path: Path, part: Part) -> bool:
    """Whether a part was sealed and its files still have the size they were sealed with.

    Args:
        path: The cache.
        part: The part.

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
