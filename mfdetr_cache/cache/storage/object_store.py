"""A cache in an object store (s3://, gs://, az://)."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import MemoryStore, from_url

from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import CacheError

_MEMORY: dict[str, MemoryStore] = {}


class ObjectStorage(Storage):
    """Objects below a URL, through obstore; it asks again when a connection breaks.

    Args:
        url: Such as ``s3://bucket/train.zarr``.
        max_retries: How often a request is sent again after a broken connection.

    Raises:
        CacheError: If the URL or the environment's settings cannot be used.
    """

    def __init__(self, url: str, max_retries: int = 10) -> None:
        self.name = url
        self._max_retries = max_retries
        if url.startswith("memory://"):
            self._store: Any = _MEMORY.setdefault(url, MemoryStore())
            return
        with self._explained():
            # A store on this machine or in a private network often speaks plain HTTP.
            plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
            options: Any = {"allow_http": True} if plain else {}
            retry: Any = {"max_retries": max_retries}
            self._store = from_url(url, client_options=options, retry_config=retry)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process connects by itself, with the credentials of its own environment.
        return ObjectStorage, (self.name, self._max_retries)

    @property
    def folder(self) -> Path | None:
        """None: there is no folder."""
        return None

    def read(self, key: str) -> bytes:
        """A whole object; see :class:`Storage`."""
        with self._explained():
            return bytes(obstore.get(self._store, key).bytes())

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Some parts of an object; see :class:`Storage`."""
        starts, lengths = [r[0] for r in ranges], [r[1] for r in ranges]
        with self._explained():
            found = obstore.get_ranges(self._store, key, starts=starts, lengths=lengths)
        return [bytes(piece) for piece in found]

    def size(self, key: str) -> int | None:
        """Bytes of an object; see :class:`Storage`."""
        try:
            with self._explained():
                return int(obstore.head(self._store, key)["size"])
        except FileNotFoundError:
            return None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Objects below a prefix; see :class:`Storage`."""
        found: dict[str, int] = {}
        with self._explained():
            for page in obstore.list(self._store, prefix or None):
                found |= {str(o["path"]): int(o["size"]) for o in page}
        return dict(sorted(found.items()))

    def write(self, key: str, pieces: Sequence[bytes]) -> None:
        """Put an object; see :class:`Storage`."""
        with self._explained():
            obstore.put(self._store, key, b"".join(pieces))

    def delete(self, key: str) -> None:
        """Remove an object; see :class:`Storage`."""
        with self._explained():
            obstore.delete(self._store, key)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what a store says into a line a person can act on."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (BaseError, ValueError) as error:
            # The store's own words are long and repeat themselves; the first line says it.
            reason = str(error).splitlines()[0][:300]
            raise CacheError(
                f"{self.name} cannot be used: {reason}; check the URL, the network and the "
                "credentials in the environment"
            ) from error
