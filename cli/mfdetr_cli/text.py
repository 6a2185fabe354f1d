"""Text on a terminal: names are shown and never obeyed, and no stream ends a command."""

import os
import unicodedata
from typing import TextIO


def harmless(text: str) -> str:
    """Text with control characters, lone surrogates and direction marks escaped, newlines kept.

    Names from annotation files and folders could otherwise control the terminal.
    """
    return "".join(c if _is_harmless(c) else ascii(c)[1:-1] for c in text)


def _is_harmless(character: str) -> bool:
    if character == "\n":
        return True
    turns = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    # Zl and Zp end a line for some terminals.
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") and not turns


def put(stream: TextIO | None, text: str) -> None:
    """Write text to standard output or error; what is wrong with these ends no command."""
    if stream is None:
        return  # closed by whoever started the command
    try:
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError:
        # A pipe that nobody reads any more, or a full disk: the rest is for nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
