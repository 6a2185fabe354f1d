"""Signals that ask a command to stop: SIGTERM, SIGHUP and Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# What a command says of its work when one of them ends it.
KEPT = "what was finished before is kept"

# Whether one of them came. Not an Event, whose lock the main thread may hold when a handler runs.
_came = False


def is_stopping() -> bool:
    """Whether a signal asked to stop, so that waiting for somebody else has no use."""
    return _came


class StoppedBySignal(KeyboardInterrupt):
    """Raised in the main thread by a signal that asks to stop; its text is the signal's name."""


class StopRequest:
    """Whether a signal asked to stop; :func:`stop_on_signals` makes it."""

    def __init__(self) -> None:
        self.is_set = False
        self._interrupts = False

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise StoppedBySignal for a signal that comes meanwhile, or came before."""
        self._interrupts = True
        try:
            if self.is_set:
                raise StoppedBySignal
            yield
        finally:
            self._interrupts = False

    def ask(self, number: int, _frame: FrameType | None) -> None:
        """The handler; whoever asks twice does not want to wait."""
        _note()
        again, self.is_set = self.is_set, True
        if again or self._interrupts:
            raise StoppedBySignal(signal.Signals(number).name)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let the signals raise StoppedBySignal in the main thread, where two would kill."""

    def end(number: int, _frame: FrameType | None) -> None:
        _note()
        raise StoppedBySignal(signal.Signals(number).name)

    with _handled_by(end):
        yield


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Let the signals set a flag; outside of the main thread none does."""
    request = StopRequest()
    with _handled_by(request.ask):
        yield request


def ignore_signals() -> None:
    """Nothing stops any more; for the end of the process."""
    for number in _ASKING:
        signal.signal(number, signal.SIG_IGN)


def _note() -> None:
    global _came
    _came = True


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) or signal.SIG_DFL for s in _ASKING}
    # Under nohup a terminal that closes is no reason to stop.
    asking = [s for s in _ASKING if s != signal.SIGHUP or before[s] != signal.SIG_IGN]
    for number in asking:
        signal.signal(number, handler)
    try:
        yield
    finally:
        global _came
        _came = False
        for number in asking:
            signal.signal(number, before[number])
