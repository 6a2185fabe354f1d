"""Settings as options: which ones a dataclass has, and the command line that gives its values."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from mfdetr_cache.options import Built, Only, Option


class Setting(NamedTuple):
    """A field of a settings dataclass, with its ``Annotated`` option."""

    field: Field[Any]
    hint: Any
    option: Option
    group: type[Any] | None  # its fields are options, in a panel of their own
    only: tuple[str, ...]

    @property
    def name(self) -> str:
        """As typed; an argument has no dashes."""
        no = "no-" if self.field.default is True else ""
        return self.option.name or f"--{no}{self.field.name.replace('_', '-')}"

    @property
    def parameter(self) -> str:
        """Of the function that Typer calls."""
        return self.name.strip("-").replace("-", "_").lower()


def settings_of(kind: type[Any], only: tuple[str, ...] = ()) -> Iterator[Setting]:
    """The fields of a dataclass, or those named ``only``."""
    # What several commands share (--device) stands behind the options of their own.
    for field in sorted(fields(kind), key=lambda f: bool(f.kw_only)):
        if only and field.name not in only:
            continue
        annotated = get_origin(field.type) is Annotated
        hint, *extra = get_args(field.type) if annotated else [field.type]
        option = next((e for e in extra if isinstance(e, Option)), Option())
        group = next((e.kind for e in extra if isinstance(e, Built)), hint)
        chosen = next((e.names for e in extra if isinstance(e, Only)), ())
        yield Setting(field, hint, option, group if is_dataclass(group) else None, chosen)  # type: ignore[arg-type]


def as_typed(value: object) -> str:
    """A value as ``--set`` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(as_typed, value)) if isinstance(value, list | tuple) else str(value)


def typed(command: str, settings: Any, **instead: object) -> str:  # noqa: ANN401
    """The command line that gives these settings, without options that have their defaults.

    ``instead`` has the options, as they are typed, that cannot be told from the settings any more.
    """
    words = ["mfdetr", command]
    given = {f"--{name}": value for name, value in instead.items() if value}
    for name, value in (_chosen(settings) | given).items():
        for each in value if isinstance(value, list) else [value]:
            words += [name] if each is True else [name, str(each)]
    return shlex.join(words)


def _chosen(settings: Any) -> dict[str, object]:  # noqa: ANN401
    """Options and what is typed behind them, True for nothing."""
    found: dict[str, object] = {}
    for setting in settings_of(type(settings)):
        field, value = setting.field, getattr(settings, setting.field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if setting.group is not None:
            found |= _chosen(value) if setting.group is setting.hint else {}
        elif isinstance(value, Mapping):
            found[setting.name] = [f"{key}={item}" for key, item in value.items()]
        elif value != default and isinstance(value, tuple):
            separator = "x" if isinstance(value[0], int) else ","
            found[setting.name] = separator.join(map(str, value))
        elif value != default:
            is_flag = isinstance(value, bool)
            found[setting.name] = is_flag or (f"{value:g}" if isinstance(value, float) else value)
    return found
