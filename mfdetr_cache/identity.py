"""Which cache this is: everything that decides its content, as plain values with a hash."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from mfdetr_cache.config import to_dict
from mfdetr_cache.errors import IdentityError
from mfdetr_cache.fields import Fields
from mfdetr_cache.types import DetectorSpec, MapRole, MapSpec

Identity = dict[str, Any]


def detector_identity(spec: DetectorSpec) -> Identity:
    """What a train cache, a validation cache and a head must have in common."""
    return to_dict(spec)


def spec_from_identity(identity: object, where: str = "detector") -> DetectorSpec:
    """Inverse of :func:`detector_identity`; IdentityError for a missing or malformed field."""
    if isinstance(identity, Mapping):
        # What a detector may be without.
        unset: Identity = {"encoder_level_embed": None, "preprocessing": {}, "settings": {}}
        identity = {**unset, **identity}
    fields = Fields(identity, where, IdentityError)
    maps = tuple(
        MapSpec(
            name=m.name("name"),
            role=m.text("role", get_args(MapRole)),  # type: ignore[arg-type]
            stride=m.integer("stride", 1, 2**16),
            channels=m.integer("channels", 1, 2**16),
            source=m.text("source"),
        )
        for m in fields.each("maps")
    )
    if len({m.name for m in maps}) != len(maps):
        raise IdentityError(f"{where}: two maps have one name")
    spec = DetectorSpec(
        name=fields.text("name"),
        weights_sha256=fields.text("weights_sha256"),
        num_queries=fields.integer("num_queries", 1, 2**20),
        query_dim=fields.integer("query_dim", 1, 2**20),
        num_labels=fields.integer("num_labels", 1, 2**20),
        score_function=fields.text("score_function", ("sigmoid", "softmax")),  # type: ignore[arg-type]
        label_names=fields.texts("label_names"),
        maps=maps,
        encoder_level_embed=fields.matrix("encoder_level_embed"),
        preprocessing=dict(fields.fields("preprocessing").values),
        settings=dict(fields.fields("settings").values),
    )
    if len(spec.label_names) != spec.num_labels:
        raise IdentityError(f"{where}: {len(spec.label_names)} names for {spec.num_labels} labels")
    return spec


def images_identity(images: Iterable[tuple[int, str, tuple[int, int]]]) -> Identity:
    """Number of images, and a SHA-256 over id, file name, height and width of each, in order."""
    listed = [[image_id, name, *size_hw] for image_id, name, size_hw in images]
    text = json.dumps(listed, separators=(",", ":"))
    return {"count": len(listed), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def identity_hash(identity: Mapping[str, Any]) -> str:
    """First 16 hexadecimal digits of a SHA-256 over the canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(first: object, second: object, path: str = "") -> list[tuple[str, object, object]]:
    """Path, first and second value of every field in which two identities differ.

    >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
    [('a.b', 1, 2)]
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        changed: list[tuple[str, object, object]] = []
        for key in dict.fromkeys([*first, *second]):
            inner = f"{path}.{key}" if path else str(key)
            changed += differences(first.get(key), second.get(key), inner)
        return changed
    return [] if first == second else [(path, first, second)]


def require_same(first: Identity, first_name: str, second: Identity, second_name: str) -> None:
    """Raise IdentityError, naming the field and both values, if two detector identities differ."""
    changed = differences(first, second)
    if not changed:
        return
    field, ours, theirs = changed[0]
    more = f" (and {len(changed) - 1} more fields)" if len(changed) > 1 else ""
    raise IdentityError(
        f"{first_name} and {second_name} come from different detectors: {field} is "
        f"{_short(ours)} in the one and {_short(theirs)} in the other{more}; "
        "extract both with the same detector and settings"
    )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
