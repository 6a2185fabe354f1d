"""A cache in an object store (s3://, gs://, az://)."""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import BaseError, GenericError
from obstore.store import MemoryStore, from_url

from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import CacheError
from mfdetr_cache.signals import is_stopping

AnswerT = TypeVar("AnswerT")

_MEMORY: dict[str, MemoryStore] = {}
# How long a store that has answered before may be away.
PATIENCE_SECONDS = 600.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0


class ObjectStorage(Storage):
    """Objects below a URL such as ``s3://bucket/train.zarr``, through obstore.

    A request is sent again ``max_retries`` times after a broken connection, for some seconds. A
    store that has answered before is waited for, with a warning, for ``patience`` seconds.
    CacheError if the URL or the environment's settings cannot be used.
    """

    def __init__(self, url: str, max_retries: int = 10, patience: float = PATIENCE_SECONDS) -> None:
        self.name = url
        self._max_retries = max_retries
        self._patience = patience
        self._has_answered = False
        if url.startswith("memory://"):
            self._store: Any = _MEMORY.setdefault(url, MemoryStore())
            return
        with self._explained():
            # A store on this machine or in a private network often speaks plain HTTP.
            plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
            options: Any = {"allow_http": True} if plain else {}
            retry: Any = {"max_retries": max_retries, "retry_timeout": timedelta(seconds=30)}
            self._store = from_url(url, client_options=options, retry_config=retry)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process connects by itself, with the credentials of its own environment.
        known = {"_has_answered": self._has_answered}
        return ObjectStorage, (self.name, self._max_retries, self._patience), known

    def read(self, key: str) -> bytes:
        return self._answer(lambda: bytes(obstore.get(self._store, key).bytes()))

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        starts, lengths = [r[0] for r in ranges], [r[1] for r in ranges]
        pieces = self._answer(
            lambda: obstore.get_ranges(self._store, key, starts=starts, lengths=lengths)
        )
        return [bytes(piece) for piece in pieces]

    def forget(self, key: str) -> bool:
        # An answer may be damaged on its way where the object is whole.
        self._tell(f"gave other bytes of {key} than were written; it is asked once more")
        return True

    def size(self, key: str) -> int | None:
        try:
            return self._answer(lambda: int(obstore.head(self._store, key)["size"]))
        except FileNotFoundError:
            return None

    def sizes(self, prefix: str) -> dict[str, int]:
        def listed() -> dict[str, int]:
            pages = obstore.list(self._store, prefix or None)
            return {str(o["path"]): int(o["size"]) for page in pages for o in page}

        return dict(sorted(self._answer(listed).items()))

    def write(self, key: str, pieces: Sequence[bytes]) -> None:
        data = b"".join(pieces)
        self._answer(lambda: obstore.put(self._store, key, data))

    def delete(self, key: str) -> None:
        self._answer(lambda: obstore.delete(self._store, key))

    def _answer(self, ask: Callable[[], AnswerT]) -> AnswerT:
        """What a request gives, asked again while the store is away."""
        away_since, pause = 0.0, _FIRST_PAUSE
        while True:
            try:
                with self._explained():
                    answer = ask()
            except CacheError as error:
                away_since = away_since or time.monotonic()
                left = away_since + self._patience - time.monotonic()
                cause = error.__cause__
                is_away = self._has_answered and left > 0 and not is_stopping()
                if not (is_away and isinstance(cause, GenericError)):
                    raise
                if pause == _FIRST_PAUSE:
                    self._tell(
                        f"does not answer ({_reason(cause)}); it is asked again for "
                        f"{self._patience / 60:.0f} minutes"
                    )
                _sleep(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE)
            except FileNotFoundError:
                self._has_answered = True
                raise
            else:
                if away_since:
                    self._tell(f"answers again after {time.monotonic() - away_since:.0f} s")
                self._has_answered = True
                return answer

    def _tell(self, what: str) -> None:
        # The time makes a second outage another warning, while all readers of one warn once.
        text = f"{self.name} {what} ({time.strftime('%H:%M:%S')})"
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what a store says into a line a person can act on."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (BaseError, ValueError) as error:
            raise CacheError(
                f"{self.name} cannot be used: {_reason(error)}; check the URL, the network and the "
                "credentials in the environment"
            ) from error


def _reason(error: BaseException) -> str:
    """The store's own words are long and repeat themselves; the first line says it."""
    return next(iter(str(error).splitlines()), "")[:300]


def _sleep(seconds: float) -> None:
    """Sleep, unless a signal asks to stop: only the main thread is woken by one."""
    until = time.monotonic() + seconds
    while not is_stopping() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.2))
