"""Options that several commands share, so that their help cannot drift apart."""

from pathlib import Path
from typing import Annotated, Literal

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


def parse_batch_size(text: str | None) -> int | Literal["auto"] | None:
    """``--batch-size`` as a number or ``auto``.

    Args:
        text: As typed; None if it was not.

    Returns:
        The number, ``auto``, or None.

    Raises:
        ConfigError: If it is neither.
    """
    if text is None or text == "auto":
        return text  # type: ignore[return-value]
    if not text.isdigit():
        raise ConfigError(f"--batch-size {text!r}: give a number, or auto")
    return int(text)
