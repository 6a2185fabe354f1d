"""Ids as people write them: whole numbers, floats, text; everything inside counts in integers."""

import math
from collections.abc import Iterable, Sequence

SourceId = int | str

# Evaluators keep ids in doubles, which hold every whole number up to here.
_LARGEST = 2**53


def source_id(value: object) -> SourceId | None:
    """The one form of an id, however it is written: ``'1'``, ``1.0`` and ``1`` are one id.

    A whole number where it is one, else text; None for what is no id (null, true, a list).

    Examples:
        >>> [source_id(v) for v in (7, 7.0, "7", " 7.0 ", "007", "a7", None, True, [7])]
        [7, 7, 7, 7, '007', 'a7', None, None, None]
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() else None
    if not isinstance(value, str):
        return None
    text = value.strip()
    whole = text[:-2] if text.endswith(".0") else text
    digits = whole.removeprefix("-")
    # '007' is a name, and so are digits of other scripts and numbers too long for anything.
    if digits.isascii() and digits.isdigit() and len(digits) < 20 and str(int(whole)) == whole:
        return int(whole)
    return text or None


def internal_ids(ids: Sequence[SourceId | None]) -> list[int]:
    """Our own id for each: the user's where all are usable, else numbers from 1.

    Usable are different whole numbers from 0 to 2^53.

    Examples:
        >>> internal_ids([4, 0]), internal_ids([4, -1]), internal_ids([4, 4]), internal_ids(["a"])
        ([4, 0], [1, 2], [1, 2], [1])
    """
    usable = [i for i in ids if isinstance(i, int) and 0 <= i <= _LARGEST]
    if len(set(usable)) == len(ids):
        return usable
    return list(range(1, len(ids) + 1))


def named(ids: Iterable[SourceId | None]) -> str:
    """Ids for a message: the first ten, and how many more there are.

    Examples:
        >>> named(range(12))
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    listed = [str(i) for i in ids]
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return ", ".join(listed[:10]) + more
