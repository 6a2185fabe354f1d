"""Ids and names as people write them: whole numbers, floats, text; inside, all are integers."""

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TypeVar

SourceId = int | str
_Found = TypeVar("_Found")

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


def number_of(written: object) -> int | None:
    """The number that a text is, such as ``'000139'``; None for anything else."""
    if isinstance(written, str) and written.isascii() and written.isdigit() and len(written) < 20:
        return int(written)
    return None


def with_numbers(found: Mapping[SourceId, _Found]) -> dict[SourceId, _Found]:
    """What has ids, by these and by the numbers that they are with other zeros before them.

    Examples:
        >>> with_numbers({"007": "a", "b": "c"})
        {7: 'a', '007': 'a', 'b': 'c'}
    """
    counts = Counter(map(number_of, found))
    numbers: dict[SourceId, _Found] = {
        n: v for k, v in found.items() if (n := number_of(k)) is not None and counts[n] == 1
    }
    return {**numbers, **found}


def by_unique_name(
    named: Sequence[tuple[str, _Found]], plain: Callable[[str], str]
) -> dict[SourceId, _Found]:
    """What has names, by those that mean one thing alone: as written, or in the ``plain`` form."""
    found: dict[SourceId, _Found] = {}
    for form in (plain, str):  # the names as they are written come first
        counts = Counter(form(name) for name, _ in named)
        found.update({n: item for name, item in named if counts[n := form(name)] == 1})
    return found


def known_id(value: object, found: Container[SourceId]) -> SourceId | None:
    """The form of an id by which something is found, if any; else that of :func:`source_id`.

    Examples:
        >>> [known_id(value, {7}) for value in ("7", "007", "a7")]
        [7, 7, 'a7']
    """
    written = source_id(value)
    number = number_of(written)
    return number if written not in found and number in found else written


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
    """Ids or names for a message: the first ten, and how many more there are.

    Examples:
        >>> named(range(12))
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    listed = [str(i) for i in ids]
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return ", ".join(listed[:10]) + more


def images_by_name(
    by_id: Mapping[SourceId, _Found],
    files: Iterable[tuple[str, _Found]],
    wanted: set[SourceId | None],
) -> Mapping[SourceId, _Found]:
    """Images by all that can only mean one: its id, its file's name, that without its ending.

    The numbers that files are named by are taken where all that are ``wanted`` are such, and not
    all are ids: so ultralytics writes results. Names of files are not looked at where all are ids.
    """
    ids = with_numbers(by_id)
    if wanted <= ids.keys():
        return ids
    names = [
        (name, image)
        for file_name, image in files
        if file_name
        for file in [PurePosixPath(file_name.replace("\\", "/"))]
        for name in {str(file), file.name, file.stem}
    ]
    by_name = {**by_unique_name(names, str.lower), **ids}
    numbers = [(number, i) for name, i in names if (number := number_of(name)) is not None]
    by_number: dict[SourceId, _Found] = dict(numbers)
    only_one = len(by_number) == len(numbers)
    if only_one and not wanted <= by_name.keys() and wanted <= by_number.keys():
        return by_number
    return by_name


def known_image(value: object, found: Mapping[SourceId, _Found]) -> _Found | None:
    """Which of :func:`images_by_name` is meant: also by another ending, or a path that ends so."""
    written, known = source_id(value), known_id(value, found)
    if known is None or known in found or not isinstance(written, str):
        return None if known is None else found.get(known)
    path = PurePosixPath(written.replace("\\", "/"))
    ends = ("/".join(path.parts[start:]) for start in range(len(path.parts)))
    # The number in a converted file's name is no id, unlike one that is the whole name.
    names = (*(known_id(end, found) for end in ends), path.stem)
    spelled = (n for e in names for n in ((e, e.lower()) if isinstance(e, str) else (e,)))
    there = (n for n in spelled if n is not None and n in found)
    return next((found[n] for n in there), None)
