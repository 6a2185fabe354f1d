"""Values of JSON documents, each checked for its type and its bounds when it is read."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from mfdetr_cache.errors import MfdetrError

# Names that become parts of a path: no separator, no leading dot.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Fields:
    """The fields of a JSON object, each refused by ``error`` where it is not what it must be.

    ``where`` is file and field, for messages.
    """

    def __init__(self, values: object, where: str, error: type[MfdetrError]) -> None:
        self.where = where
        self._error = error
        if not isinstance(values, Mapping):
            self._refuse("", values, "an object")
        self.values: Mapping[str, Any] = values

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401
        """A field of any type that must be there."""
        if name not in self.values:
            raise self._error(f"{self.where} has no {name!r}")
        return self.values[name]

    def integer(self, name: str, low: int = 0, high: int = 2**53) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return self._integer(name, self[name], low, high)

    def number(self, name: str) -> float:
        """A number."""
        value = self[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self._refuse(name, value, "a number")
        return float(value)

    def text(self, name: str, allowed: Sequence[str] | None = None) -> str:
        """A text, one of those allowed if there are any given."""
        value = self[name]
        if not isinstance(value, str):
            self._refuse(name, value, "text")
        if allowed is not None and value not in allowed:
            self._refuse(name, value, f"one of {', '.join(allowed)}")
        return value

    def name(self, name: str) -> str:
        """A text that may be part of a path."""
        return self._matching(name, self[name], _NAME, "a plain name")

    def sha256(self, name: str) -> str:
        """64 hexadecimal digits."""
        return self._matching(name, self[name], _SHA256, "a SHA-256")

    def names(self, name: str) -> tuple[str, ...]:
        """A list of different texts that may be parts of a path."""
        values = self._list(name)
        texts = tuple(self._matching(name, v, _NAME, "a list of plain names") for v in values)
        if len(set(texts)) != len(texts):
            self._refuse(name, values, "a list without repetition")
        return texts

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self._list(name)
        if not all(isinstance(v, str) for v in values):
            self._refuse(name, values, "a list of texts")
        return tuple(values)

    def integers(self, name: str, low: int, high: int) -> tuple[int, ...]:
        """A list of whole numbers."""
        return tuple(self._integer(name, v, low, high) for v in self._list(name))

    def matrix(self, name: str) -> tuple[tuple[float, ...], ...] | None:
        """A list of lists of numbers, or null."""
        if self[name] is None:
            return None
        rows = self._list(name)
        numbers = [v for row in rows for v in (row if isinstance(row, list) else [None])]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers):
            self._refuse(name, rows, "lists of numbers")
        return tuple(tuple(float(v) for v in row) for row in rows)

    def fields(self, name: str) -> "Fields":
        """An object inside this one."""
        return Fields(self[name], f"{self.where}: {name}", self._error)

    def each(self, name: str) -> Iterator["Fields"]:
        """The objects of a list."""
        for number, value in enumerate(self._list(name)):
            yield Fields(value, f"{self.where}: {name}[{number}]", self._error)

    def items(self) -> Iterator[tuple[str, "Fields"]]:
        """The objects inside this one, by name."""
        for name in self.values:
            yield name, self.fields(name)

    def _list(self, name: str) -> list[Any]:
        value = self[name]
        if not isinstance(value, list):
            self._refuse(name, value, "a list")
        return value

    def _integer(self, name: str, value: object, low: int, high: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self._refuse(name, value, f"a whole number from {low} to {high}")
        return value

    def _matching(self, name: str, value: object, pattern: re.Pattern[str], what: str) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self._refuse(name, value, what)
        return value

    def _refuse(self, name: str, value: object, expected: str) -> NoReturn:
        where = f"{self.where}: {name}" if name else self.where
        text = repr(value)
        raise self._error(
            f"{where} is {text if len(text) <= 60 else text[:57] + '...'} and not {expected}"
        )
