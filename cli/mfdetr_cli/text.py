"""Text of others on a terminal: names of files and categories are shown, never obeyed."""

import unicodedata


def harmless(text: str) -> str:
    """Text with control characters, lone surrogates and direction marks escaped, newlines kept.

    Names from annotation files and folders could otherwise control the terminal.
    """
    return "".join(c if _is_harmless(c) else ascii(c)[1:-1] for c in text)


def _is_harmless(character: str) -> bool:
    if character == "\n":
        return True
    turns = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return unicodedata.category(character) not in ("Cc", "Cs") and not turns
