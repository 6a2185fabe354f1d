"""Options that several commands share, so that their help cannot drift apart."""

from pathlib import Path
from typing import Annotated

import typer

from mfdetr_cache.errors import ConfigError

JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result to this file too, as JSON."),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")
]


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """``key=value`` texts as a dictionary.

    Args:
        assignments: As typed.

    Returns:
        Key to value.

    Raises:
        ConfigError: If one has no ``=``.
    """
    parsed: dict[str, str] = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {assignment!r}: write key=value, such as --set lr=3e-4")
        parsed[key.strip()] = value.strip()
    return parsed
