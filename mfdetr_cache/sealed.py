"""JSON documents that begin with the SHA-256 of all that follows in them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_HEAD = b'{\n "sha256": "'
_END_OF_HEAD = b'",'
_HASH_AT = slice(len(_HEAD), len(_HEAD) + 64)
_BODY = len(_HEAD) + 64 + len(_END_OF_HEAD)


def seal(document: Mapping[str, Any]) -> bytes:
    """A document as a file that carries its own hash.

    The first field of its JSON object is ``sha256``: that of every byte behind it.
    """
    body = json.dumps(document, indent=1, sort_keys=True).encode()[1:]
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _END_OF_HEAD + body


def seal_of(data: bytes) -> str:
    """The hash that a sealed document carries; empty where it is not that of its bytes."""
    begins = data.startswith(_HEAD) and data[_BODY - len(_END_OF_HEAD) : _BODY] == _END_OF_HEAD
    digest = hashlib.sha256(data[_BODY:]).hexdigest()
    return digest if begins and data[_HASH_AT] == digest.encode() else ""
