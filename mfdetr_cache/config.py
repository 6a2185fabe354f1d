"""Settings as frozen dataclasses: JSON both ways, ``key=value`` overrides, unknown keys refused."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from mfdetr_cache.errors import ConfigError

ConfigT = TypeVar("ConfigT")


def to_dict(config: object) -> dict[str, Any]:
    """A settings dataclass as plain JSON values; tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[call-overload]
    return plain


def from_dict(kind: type[ConfigT], values: Mapping[str, Any], where: str) -> ConfigT:
    """A settings dataclass from plain values; missing ones keep their default.

    Fields are scalars, tuples of scalars, or optional. ConfigError, which names ``where``, for an
    unknown key or a value that does not fit its field.
    """
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"{where}: unknown setting {key!r}{nearest(key, names)}")
    converted = {k: _convert(v, hints[k], f"{where}: {k}") for k, v in values.items()}
    try:
        return kind(**converted)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def completed(kind: type[object], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values an earlier version's :func:`to_dict` wrote, with newer fields at their defaults."""
    return {**to_dict(kind()), **values}


def nearest(key: str, names: list[str]) -> str:
    """The end of an "unknown name" message: the closest known name, or all of them.

    >>> nearest("hiden_dim", ["hidden_dim", "roi_size"])
    "; did you mean 'hidden_dim'?"
    """
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(names))}"


def override(config: ConfigT, assignments: Mapping[str, str], where: str) -> ConfigT:
    """The same settings with some fields replaced by text as typed on a command line.

    ConfigError, which names ``where``, for an unknown key or a value that does not fit its field.
    """
    return from_dict(type(config), {**to_dict(config), **assignments}, where)


def _convert(value: Any, hint: Any, where: str) -> Any:  # noqa: ANN401
    """Bring a JSON or text value to the field's type, or say why that cannot be."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if value in allowed:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(str, allowed))}, not {value!r}")
    if origin in (types.UnionType, typing.Union):
        if value is None or value == "none":
            return None
        inner = next(a for a in typing.get_args(hint) if a is not type(None))
        return _convert(value, inner, where)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        parts = value.split(",") if isinstance(value, str) else list(value)
        return tuple(_convert(part, item, where) for part in parts if part != "")
    return _convert_scalar(value, hint, where)


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:  # noqa: ANN401
    if hint is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ConfigError(f"{where} must be true or false, not {value!r}")
    try:
        if hint is int and isinstance(value, float) and value != int(value):
            raise ValueError
        if hint is float and not math.isfinite(float(value)):
            raise ValueError
        return hint(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where} must be of type {hint.__name__}, not {value!r}") from None
