"""JSON documents of a cache. A sealed one begins with the SHA-256 of all that follows in it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from mfdetr_cache.cache.storage.protocol import Storage
from mfdetr_cache.errors import MEND, CacheError
from mfdetr_cache.fields import Fields

# The root of a detector with thousands of labels has some 100 kB, a manifest 10 kB.
_MOST_BYTES = 64 * 2**20
_HEAD = b'{\n "sha256": "'
_END_OF_HEAD = b'",'
_HASH_AT = slice(len(_HEAD), len(_HEAD) + 64)
_BODY = len(_HEAD) + 64 + len(_END_OF_HEAD)


def seal(document: Mapping[str, Any]) -> bytes:
    """A document as a file that carries its own hash.

    Args:
        document: Plain JSON values.

    Returns:
        The same JSON object with ``sha256`` as its first field: that of every byte behind it.
    """
    body = json.dumps(document, indent=1, sort_keys=True).encode()[1:]
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _END_OF_HEAD + body


def read_document(storage: Storage, key: str) -> Fields:
    """A JSON object.

    Args:
        storage: Where the cache is.
        key: Its key.

    Returns:
        Its fields.

    Raises:
        FileNotFoundError: If there is none.
        CacheError: If it is no JSON object.
    """
    where = f"{storage.name}/{key}"
    return _parsed(_read(storage, key), where)


def read_sealed(storage: Storage, key: str) -> Fields:
    """A sealed document.

    Args:
        storage: Where the cache is.
        key: Its key.

    Returns:
        Its fields, the hash among them.

    Raises:
        FileNotFoundError: If there is none.
        CacheError: If one of its bytes is not what was written.
    """
    where = f"{storage.name}/{key}"
    data = _read(storage, key)
    whole = seal_of(data)
    if not whole:
        raise CacheError(f"{where} is damaged: its bytes are not those that were written; {MEND}")
    return _parsed(data, where)


def seal_of(data: bytes) -> str:
    """The hash that a sealed document carries; empty where it is not that of its bytes."""
    begins = data.startswith(_HEAD) and data[_BODY - len(_END_OF_HEAD) : _BODY] == _END_OF_HEAD
    found = hashlib.sha256(data[_BODY:]).hexdigest()
    return found if begins and data[_HASH_AT] == found.encode() else ""


def _read(storage: Storage, key: str) -> bytes:
    size = storage.size(key)
    if size is not None and size > _MOST_BYTES:
        raise CacheError(
            f"{storage.name}/{key} has {size} bytes, more than {_MOST_BYTES}: it is none of a cache"
        )
    return storage.read(key)


def _parsed(data: bytes, where: str) -> Fields:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    try:
        found = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise CacheError(f"{where} is damaged: it is no JSON; {MEND}") from None
    return Fields(found, where, CacheError)
