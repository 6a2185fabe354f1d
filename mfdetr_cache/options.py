"""How settings are written on a command line, said where they are declared; no Typer in here.

A command's settings are a frozen dataclass whose docstring is the command's help. A field becomes
an option of its own name. What a name and a type cannot say stands in ``Annotated`` beside them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Option:
    """What differs from the option that a field's name and type alone would give.

    Attributes:
        name: Such as ``--dtype``; a name without dashes makes an argument.
        metavar: What stands for the value in the help.
        help: In place of the text under ``Attributes``: for a flag ``--no-x``, what it leaves out.
        parse: Turns what was typed into the value; raises ValueError with what to write instead.
        takes_zero: Whether a number may be 0 whose default is another; none may be negative.
    """

    name: str = ""
    metavar: str = ""
    help: str = ""
    parse: Callable[[Any], Any] | None = None
    takes_zero: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """A value that is made from a group of options.

    Attributes:
        kind: Dataclass of the options; its ``build()`` gives the value.
    """

    kind: type[Any]


class Only:
    """The fields of a group that a command offers; the others keep their defaults."""

    def __init__(self, *names: str) -> None:
        self.names = names


def existing_file(text: str) -> Path:
    """A file that must be there before anything else is done."""
    if not Path(text).is_file():
        is_folder = Path(text).is_dir()
        raise ValueError(
            "a folder, where a file is wanted" if is_folder else "there is no such file"
        )
    return Path(text)


def existing_folder(text: str) -> Path:
    """A folder that must be there before anything else is done."""
    if not Path(text).is_dir():
        raise ValueError("there is no such folder")
    if not os.access(text, os.R_OK | os.X_OK):
        # A search of it would find nothing.
        raise ValueError("may not be read by this user")
    return Path(text)


def existing_cache(text: str) -> str:
    """A cache that must be there, unless it is in an object store, which answers later."""
    # Behind an @ stands the version of its annotations.
    before = text.rpartition("@")[0] if text.rpartition("@")[2].isdigit() else ""
    if "://" not in text and not any(Path(path).exists() for path in (text, before) if path):
        raise ValueError("does not exist; make it with: mfdetr extract")
    return text


def writable_file(text: str) -> Path:
    """A file for a result, refused before hours of work and not after them."""
    path = Path(text)
    if path.is_dir():
        raise ValueError("is a folder; name a file")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(path if path.exists() else above, os.W_OK):
        raise ValueError("cannot be written there")
    return path


FILE = Option(metavar="FILE", parse=existing_file)
FOLDER = Option(metavar="FOLDER", parse=existing_folder)
CACHE = Option(metavar="CACHE", parse=existing_cache)
