"""Commands from documented dataclasses: fields are the options, their docstrings the help."""

import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from mfdetr_pipelines.config.shared import Output
from mfdetr_pipelines.config.typed import Setting, settings_of

from mfdetr_cache.errors import ConfigError
from mfdetr_cache.options import Option

_METAVARS = {int: "N", float: "X", Path: "PATH", str: "TEXT", bool: ""}


def command_of(kind: type[Any], run: Callable[[Any, Path | None], None]) -> Callable[..., None]:
    """A function for Typer, with the options of ``kind``; runs with them and ``--json``'s file."""

    def command(**typed: Any) -> None:  # noqa: ANN401
        run(built(kind, typed), built(Output, typed).json)

    parameters = [*_parameters(kind), *_parameters(Output)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def help_of(kind: type[Any]) -> tuple[str, str]:
    """The first line of a command's help, and all that stands before its options."""
    about, _, example = documented(kind)[0].partition("\n\nExample:\n")
    # An option and its value stay together.
    words = re.sub(r"(--\S+) (?=[^-])", r"\1\0", " ".join(example.split()))
    lines = " \\\n    ".join(textwrap.wrap(words, 72, break_on_hyphens=False)).replace("\0", " ")
    summary = " ".join(about.partition("\n\n")[0].split())
    return summary, f"{about}\n\n\b\nExample:\n  {lines}"


def documented(kind: type[Any]) -> tuple[str, dict[str, str]]:
    """A dataclass's docstring before its attributes, and the text of each attribute."""
    about, _, listed = inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", listed, re.MULTILINE)
    return about, {name: " ".join(text.split()) for name, text in entries}


def _parameters(
    kind: type[Any], panel: str | None = None, only: tuple[str, ...] = ()
) -> Iterator[inspect.Parameter]:
    texts = {k: v for base in kind.__mro__ for k, v in documented(base)[1].items()}
    for setting in settings_of(kind, only):
        field, hint, option, group, chosen = setting
        if group is not None:
            title = documented(group)[0].partition("\n")[0].rstrip(".")
            yield from _parameters(group, title, chosen)
            continue
        taken, metavar = _taken(hint, option)
        # python -OO leaves no text.
        said = option.help or texts.get(field.name, "")
        about: dict[str, Any] = {"help": said, "rich_help_panel": panel}
        about["metavar"] = option.metavar or metavar or None
        is_option = setting.name.startswith("-")
        info = typer.Option(setting.name, **about) if is_option else typer.Argument(**about)
        yield inspect.Parameter(
            setting.parameter,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=Annotated[taken | None, info],
        )


def _taken(hint: Any, option: Option) -> tuple[Any, str]:  # noqa: ANN401
    """The type that Typer parses, and the metavar shown in the help."""
    is_union = get_origin(hint) in (UnionType, Union)
    kinds = [h for h in get_args(hint) if h is not NoneType] if is_union else [hint]
    # What only the type checker knows, such as the location of a cache, is text.
    kind = kinds[0] if len(kinds) == 1 else str
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Mapping:
        return list[str], "KEY=VALUE"
    if option.parse is None and origin is tuple:
        return list[inner[0]], _METAVARS[inner[0]]  # type: ignore[valid-type]
    if option.parse is None and (origin is Literal or kind in _METAVARS):
        return kind, "|".join(inner) or _METAVARS[kind]
    return str, "TEXT"


def _default(field: Field[Any]) -> Any:  # noqa: ANN401
    """A field's default as its option has it; None where there is nothing to show."""
    if field.default is MISSING:
        return inspect.Parameter.empty if field.default_factory is MISSING else None
    if isinstance(field.default, tuple):
        return ",".join(field.default) or None
    return False if field.default is True else field.default


def _require_bounds(setting: Setting, value: Any) -> None:  # noqa: ANN401
    """Refuse numbers out of bounds: 0 is one where it is the default, or the option says so."""
    takes_zero = setting.option.takes_zero or setting.field.default == 0
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not 0 <= number < math.inf:
            raise ValueError("must be a number that is not negative")
        if isinstance(number, int) and not 0 <= number < 2**31:
            raise ValueError(f"must be from {0 if takes_zero else 1} to {2**31 - 1}")
        if isinstance(number, int | float) and not number and not takes_zero:
            raise ValueError("must be above 0")


def built(kind: type[Any], typed: Mapping[str, Any], only: tuple[str, ...] = ()) -> Any:  # noqa: ANN401
    """A settings object from Typer's values; options that were not given keep their defaults."""
    given: dict[str, Any] = {}
    for setting in settings_of(kind, only):
        name, value = setting.field.name, typed.get(setting.parameter)
        if setting.group is not None:
            made = built(setting.group, typed, setting.only)
            given[name] = made if setting.group is setting.hint else made.build()
        elif value is True:
            given[name] = setting.field.default is not True
        elif value is not None and value is not False and value != []:
            same = tuple if isinstance(value, list) else type(value)
            try:
                given[name] = (setting.option.parse or same)(value)
                _require_bounds(setting, given[name])
            except ValueError as error:
                raise ConfigError(f"{setting.name} {value}: {error}") from error
    return kind(**given)
