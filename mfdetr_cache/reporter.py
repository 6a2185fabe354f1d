"""Who a command tells about its progress; never results."""

from typing import Protocol


class Reporter(Protocol):
    """Listens to a pipeline: progress for people, never results."""

    def say(self, message: str) -> None:
        """A line of information.

        Args:
            message: One line of text.
        """

    def warn(self, message: str) -> None:
        """A line nobody should miss.

        Args:
            message: One line of text.
        """

    def start(self, task: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a task of known length; only one runs at a time.

        Args:
            task: What is being done, in a few words.
            total: How many units there are.
            unit: Name of a unit, in the plural.
            done: How many were done in an earlier run.
        """

    def advance(self, count: int = 1, *, num_bytes: int = 0, note: str = "") -> None:
        """Units of the running task are done.

        Args:
            count: How many.
            num_bytes: Bytes they wrote or read.
            note: What to show beside the bar, replacing the last note when not empty.
        """

    def finish(self) -> None:
        """End the running task."""


class SilentReporter:
    """Says nothing; for library use and tests. Keeps what it was told in ``messages``."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        """Keep the message.

        Args:
            message: One line of text.
        """
        self.messages.append(message)

    def warn(self, message: str) -> None:
        """Keep the warning.

        Args:
            message: One line of text.
        """
        self.messages.append(f"warning: {message}")

    def start(self, task: str, total: int, unit: str, done: int = 0) -> None:
        """Nothing to show."""

    def advance(self, count: int = 1, *, num_bytes: int = 0, note: str = "") -> None:
        """Nothing to show."""

    def finish(self) -> None:
        """Nothing to show."""
