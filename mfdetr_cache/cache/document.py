"""JSON documents of a cache."""

import json
from typing import NoReturn

from mfdetr_cache.cache.storage.protocol import Storage, read_whole
from mfdetr_cache.errors import MEND, CacheError
from mfdetr_cache.fields import Fields
from mfdetr_cache.sealed import seal_of

# The root of a detector with thousands of labels has some 100 kB, a manifest 10 kB.
_MOST_BYTES = 64 * 2**20


def read_document(storage: Storage, key: str, *, sealed: bool = False) -> Fields:
    """A JSON object; FileNotFoundError if there is none.

    CacheError if it is anything else, or a byte of a sealed one was changed.
    """
    where, size = f"{storage.name}/{key}", storage.size(key)
    if size is not None and size > _MOST_BYTES:
        raise CacheError(
            f"{where} has {size} bytes, more than {_MOST_BYTES}: it is none of a cache"
        )
    data = read_whole(storage, key, seal_of if sealed else _is_json)
    if sealed and not seal_of(data):
        raise CacheError(f"{where} is damaged: its bytes are not those that were written; {MEND}")

    try:
        document = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise CacheError(f"{where} is damaged: it is no JSON; {MEND}") from None
    return Fields(document, where, CacheError)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def read_sealed(storage: Storage, key: str) -> Fields:
    """A sealed document, as :func:`read_document`."""
    return read_document(storage, key, sealed=True)
