"""What is wrong with a file of annotations or results: collected first, then told at once."""

import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mfdetr_cache.choices import OnBad
from mfdetr_cache.errors import DatasetError
from mfdetr_cache.reporter import Reporter

# So many are named; the others are a number.
_NAMED = 10
# COCO itself has boxes beside their masks; from this share on it is worth a word.
_SHARE_WORTH_A_WORD = 0.02

_shortener = reprlib.Repr()
_shortener.maxlevel, _shortener.maxlist, _shortener.maxdict = 3, 4, 4
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 40


def short(value: object) -> str:
    """A value from a file, of any size and depth, for a message."""
    return _shortener.repr(value)


def keys_of(entry: Mapping[Any, object]) -> str:
    """What an entry of a file has, for a message about what it lacks."""
    more = ", ..." if len(entry) > _NAMED else ""
    return ", ".join(short(key) for key in list(entry)[:_NAMED]) + more


class Unusable(Exception):
    """An entry that cannot be used: where it is, and what it is or has."""


@dataclass
class Faults:
    """The faults of one file; ``with faults:`` takes down an :class:`Unusable` entry.

    Attributes:
        noun: What its entries are, such as ``annotation``.
        total: How many entries it has.
        unusable: Entries that cannot be used.
        repaired: Entries that could be repaired, by what was done.
        noticed: Entries that are used as they stand although they look wrong, by what is odd.
    """

    file: str
    noun: str
    total: int = 0
    unusable: int = 0
    repaired: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    _named: list[str] = field(default_factory=list)
    _examples: dict[str, list[str]] = field(default_factory=dict)

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, Unusable):
            return False
        self.unusable += 1
        if len(self._named) < _NAMED:
            self._named.append(" ".join(error.args))
        return True

    def repair(self, where: str, what: str) -> None:
        """An entry is used, though not as it stands; ``what`` is one text for all of a kind."""
        self.repaired[what] += 1
        self._keep(where, what)

    def notice(self, where: str, what: str) -> None:
        """An entry is used as it stands; it is told about if there are many of its kind."""
        self.noticed[what] += 1
        self._keep(where, what)

    def _keep(self, where: str, what: str) -> None:
        examples = self._examples.setdefault(what, [])
        if len(examples) < _NAMED:
            examples.append(where)

    def stop_if_unusable(self, on_bad: OnBad) -> None:
        """Refuse the file unless its unusable entries are to be left out.

        The DatasetError names the first ten, and how many there are.
        """
        if self.unusable and on_bad == "stop":
            raise DatasetError(
                f"{self.file}: {self._said()}; --on-bad-annotation skip leaves them out"
            )

    def tell(self, reporter: Reporter) -> None:
        """Warn of everything that was left out or repaired."""
        if self.unusable:
            reporter.warn(f"{self.file}: left out: {self._said()}")
        least = _SHARE_WORTH_A_WORD * self.total
        many = Counter({what: n for what, n in self.noticed.items() if n >= least})
        for what, count in (self.repaired + many).items():
            which = _listed(self._examples[what], count)
            reporter.warn(f"{self.file}: {count} of {self.total} {self.noun}s: {what} ({which})")

    def _said(self) -> str:
        named = _listed(self._named, self.unusable, "; ")
        return f"{self.unusable} of {self.total} {self.noun}s cannot be used: {named}"


def _listed(named: list[str], count: int, between: str = ", ") -> str:
    more = f"{between}and {count - len(named)} more" if count > len(named) else ""
    return between.join(named) + more
