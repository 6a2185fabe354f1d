"""Settings of commands, with the fields of their groups given by themselves."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

ConfigT = TypeVar("ConfigT")


def changed(config: ConfigT, **changes: Any) -> ConfigT:
    """The settings with some of them replaced: ``max_steps=2`` in place of ``length=Length(2)``."""
    own = {f.name: getattr(config, f.name) for f in fields(config)}  # type: ignore[arg-type]
    groups: dict[str, dict[str, Any]] = {}
    for name in [n for n in changes if n not in own]:
        group = next(
            g for g, v in own.items() if is_dataclass(v) and name in {f.name for f in fields(v)}
        )
        groups.setdefault(group, {})[name] = changes.pop(name)
    changes |= {group: replace(own[group], **inner) for group, inner in groups.items()}
    return replace(config, **changes)  # type: ignore[type-var]
