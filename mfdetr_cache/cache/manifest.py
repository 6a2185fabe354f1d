"""Manifests: the commit marks of a cache, one per sealed part."""

import json
from typing import Any

from mfdetr_cache.cache.schema import BASE_VIEW, Part
from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import MEND, CacheError


def status_key(view: str = BASE_VIEW) -> str:
    """Prefix of a view's status array, where its manifests are; the writer's lock is in base's.

    Zarr readers that list a group do not look inside arrays, so files of ours that are no Zarr
    nodes disturb nobody there.

    Args:
        view: Name of the view.

    Returns:
        A key.
    """
    return f"views/{view}/status"


# What was measured about a cache's preset.
CERTIFICATES_KEY = f"{status_key()}/certificates"
# Sizes and checksums of everything written at creation.
FOUNDATION_KEY = f"{status_key()}/manifest/foundation.json"


def manifest_key(part: Part) -> str:
    """Where the manifest of a part is.

    Args:
        part: The part.

    Returns:
        Key of a JSON file.
    """
    return f"{status_key(part.view)}/manifest/{part.number:06d}.json"


def read_foundation(storage: Storage) -> dict[str, dict[str, int]]:
    """Size and CRC-32C of every file written at creation, by key.

    Args:
        storage: Where the cache is.

    Returns:
        Key to ``bytes`` and ``crc32c``.

    Raises:
        CacheError: If it is missing or damaged.
    """
    try:
        content: dict[str, dict[str, int]] = json.loads(storage.read(FOUNDATION_KEY))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        where = f"{storage.name}/{FOUNDATION_KEY}"
        raise CacheError(f"{where} is missing or damaged; {MEND}") from None
    return content


def read_manifest(storage: Storage, part: Part) -> dict[str, Any] | None:
    """The manifest of a part.

    Args:
        storage: Where the cache is.
        part: The part.

    Returns:
        Its content, or None if the part was never sealed.

    Raises:
        CacheError: If it is there but damaged.
    """
    try:
        content: dict[str, Any] = json.loads(storage.read(manifest_key(part)))
    except FileNotFoundError:
        return None
    except ValueError:
        where = f"{storage.name}/{manifest_key(part)}"
        raise CacheError(f"{where} is damaged; {MEND}") from None
    return content


def part_is_whole(storage: Storage, part: Part) -> bool:
    """Whether a part was sealed and its files still have the size they were sealed with.

    Args:
        storage: Where the cache is.
        part: The part.

    Returns:
        True if nothing of it has to be extracted again.
    """
    manifest = read_manifest(storage, part)
    if manifest is None:
        return False
    return all(storage.size(key) == f["bytes"] for key, f in manifest["files"].items())


def whole_parts(storage: Storage, parts: tuple[Part, ...]) -> set[Part]:
    """Those of some parts that are whole; one listing in place of a question per file.

    Args:
        storage: Where the cache is.
        parts: Parts.

    Returns:
        The whole ones.

    Raises:
        CacheError: If a manifest is damaged.
    """
    if storage.folder is not None:
        return {p for p in parts if part_is_whole(storage, p)}
    sizes = storage.sizes("views")
    whole = set()
    for part in parts:
        if manifest_key(part) not in sizes:
            continue
        manifest = read_manifest(storage, part)
        assert manifest is not None
        if all(sizes.get(key) == f["bytes"] for key, f in manifest["files"].items()):
            whole.add(part)
    return whole
