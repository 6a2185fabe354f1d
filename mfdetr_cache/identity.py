"""Which cache this is: everything that decides its content, as plain values with a hash."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mfdetr_cache.config import to_dict
from mfdetr_cache.errors import IdentityError
from mfdetr_cache.types import DetectorSpec, MapSpec

Identity = dict[str, Any]


def detector_identity(spec: DetectorSpec) -> Identity:
    """What a train cache, a validation cache and a head must have in common.

    Args:
        spec: The detector.

    Returns:
        The specification as plain values.
    """
    return to_dict(spec)


def spec_from_identity(identity: Identity) -> DetectorSpec:
    """The detector specification kept in an identity.

    Args:
        identity: What :func:`detector_identity` gave.

    Returns:
        The specification.
    """
    values = dict(identity)
    embed = values.get("encoder_level_embed")
    return DetectorSpec(
        **{
            **values,
            "label_names": tuple(values["label_names"]),
            "maps": tuple(MapSpec(**m) for m in values["maps"]),
            "encoder_level_embed": tuple(map(tuple, embed)) if embed else None,
        }
    )


def identity_hash(identity: Mapping[str, Any]) -> str:
    """A short name for an identity.

    Args:
        identity: Plain JSON values.

    Returns:
        The first 16 hexadecimal digits of a SHA-256 over the canonical JSON.
    """
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(first: object, second: object, path: str = "") -> list[tuple[str, object, object]]:
    """Every field in which two identities differ.

    Args:
        first: Plain JSON values.
        second: Plain JSON values.
        path: Name of what is compared, for nested calls.

    Returns:
        Field path, first value, second value.

    Examples:
        >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
        [('a.b', 1, 2)]
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        found: list[tuple[str, object, object]] = []
        for key in dict.fromkeys([*first, *second]):
            inner = f"{path}.{key}" if path else str(key)
            found += differences(first.get(key), second.get(key), inner)
        return found
    return [] if first == second else [(path, first, second)]


def require_same(first: Identity, first_name: str, second: Identity, second_name: str) -> None:
    """Refuse two artefacts that do not come from the same detector.

    Args:
        first: Detector identity of one.
        first_name: What it is, for the message.
        second: Detector identity of the other.
        second_name: What it is, for the message.

    Raises:
        IdentityError: Naming the field that differs and both values.
    """
    found = differences(first, second)
    if not found:
        return
    field, ours, theirs = found[0]
    more = f" (and {len(found) - 1} more fields)" if len(found) > 1 else ""
    raise IdentityError(
        f"{first_name} and {second_name} come from different detectors: {field} is "
        f"{_short(ours)} in the one and {_short(theirs)} in the other{more}; "
        "extract both with the same detector and settings"
    )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
