"""Progress reports of a command; never results."""

from typing import Protocol


class Reporter(Protocol):
    """Listens to a pipeline: progress for people, never results."""

    def say(self, message: str) -> None:
        """Show a line of information."""

    def warn(self, message: str) -> None:
        """Show a warning of one line."""

    def start(self, task: str, total: int, unit: str, done: int = 0) -> None:
        """Begin a task of ``total`` units; only one runs at a time.

        ``unit`` is a plural, ``done`` the number of units completed by an earlier run.
        """

    def advance(self, count: int = 1, *, num_bytes: int = 0, note: str = "") -> None:
        """Count units of the running task, and bytes written or read.

        ``note`` is shown beside the bar; an empty one keeps the last.
        """

    def finish(self) -> None:
        """End the running task."""


class SilentReporter:
    """Says nothing; for library use and tests. Keeps what it was told in ``messages``."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        """Keep the message."""
        self.messages.append(message)

    def warn(self, message: str) -> None:
        """Keep the warning."""
        self.messages.append(f"warning: {message}")

    def start(self, task: str, total: int, unit: str, done: int = 0) -> None:
        """Nothing to show."""

    def advance(self, count: int = 1, *, num_bytes: int = 0, note: str = "") -> None:
        """Nothing to show."""

    def finish(self) -> None:
        """Nothing to show."""
