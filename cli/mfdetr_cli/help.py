"""Help pages in two columns of the same width throughout, options in their groups."""

import contextlib
import itertools
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from mfdetr_cache.errors import ConfigError, StoppedError
from mfdetr_cache.signals import KEPT, StoppedBySignal

# Names that are wider put their text on the next line.
_NAMES = 26


class HelpfulCommand(TyperCommand):
    """A command whose help lists options by the group they belong to."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        """Refuse an option that lacks its value, where the next one would be taken for it."""
        options: list[Any] = [p for p in self.get_params(ctx) if p.param_type_name == "option"]
        names = {name for p in options for name in (*p.opts, *p.secondary_opts)}
        takes_value = {name for p in options if not (p.is_flag or p.count) for name in p.opts}
        for word, after in itertools.pairwise(args):
            if word == "--":
                break
            if word in takes_value and after.partition("=")[0] in names:
                raise ConfigError(f"{word} needs a value, and {after} is another option")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401  Typer's own click
        """Write the options, those without a group first."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            name, text = parameter.get_help_record(ctx) or ("", "")
            is_argument = parameter.param_type_name == "argument"
            title = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None)
            # Typer writes the type of an argument behind its name.
            groups.setdefault(title or "Options", []).append((name.partition(" <")[0], text))
        for title, records in groups.items():
            _write_table(formatter, title, records)


class HelpfulGroup(TyperGroup):
    """A group whose help tells the whole first line of every command.

    StoppedError for a signal, of which Click alone would make an empty line.
    """

    def make_context(self, *args: Any, **settings: Any) -> Any:  # noqa: ANN401
        """Parse what was typed."""
        with _stopping_in_one_line():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        """Run a command."""
        with _stopping_in_one_line():
            return super().invoke(ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the commands in the order they were registered."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, found.short_help or "") for name, found in commands if found is not None]
        _write_table(formatter, "Commands", rows, max(len(name) for name, _ in rows))


@contextlib.contextmanager
def _stopping_in_one_line() -> Iterator[None]:
    try:
        yield
    except StoppedError:
        raise  # it says what is kept
    except BaseException as error:
        if (stopped := _signal_behind(error)) is None:
            raise
        raise StoppedError(f"stopped by {stopped}; {KEPT}") from None


def _signal_behind(error: BaseException | None) -> StoppedBySignal | None:
    """The signal that ended a command, also where what it interrupted fails on the way out."""
    while error is not None and not isinstance(error, StoppedBySignal):
        error = error.__context__
    return error


def _write_table(
    formatter: Any,  # noqa: ANN401
    title: str,
    rows: list[tuple[str, str]],
    names: int = _NAMES,
) -> None:
    if not rows:
        return
    indent = " " * (names + 4)
    with formatter.section(typer.style(title, bold=True)):
        for name, text in rows:
            # What stands in brackets, such as a default, stays on one line.
            whole = re.sub(r"\[[^]]+\]", lambda m: m[0].replace(" ", "\0"), " ".join(text.split()))
            width = formatter.width - len(indent)
            lines = textwrap.wrap(whole, width, break_on_hyphens=False) or [""]
            styled = typer.style(name, fg="cyan") + " " * (names - len(name))
            if len(name) > names:
                formatter.write(f"  {styled}\n{indent}{lines[0]}\n".replace("\0", " "))
            else:
                formatter.write(f"  {styled}  {lines[0]}\n".replace("\0", " "))
            for line in lines[1:]:
                formatter.write(f"{indent}{line}\n".replace("\0", " "))
