"""Bytes and JSON documents as accidents and strangers make them."""

import json
from random import Random
from typing import Any

from tests.support.caches import document_paths, with_value

HOSTILE: list[Any] = [
    *(0, -1, 1, 3, 7, 2**31, 2**62, 2**63, 2**70, -(2**70), 0.5, 1e308, True, None, "", "x"),
    *("../../../etc/passwd", "\ud800", "\x1b[31m", [], {}, [[]], [1], {"a": 1}, ..., "0" * 64),
    *(float("nan"), float("inf"), "\0", [[1, 2, 3]], [None], "9" * 400, [0] * 5),
]
NONE_AT_ALL = (b"", b"{}", b"[]", b"5", b'"x"', b"null", b"NaN", b"\xff", b"[" * 200_000)


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """A file with bits flipped, or pieces cut off, put in, repeated or zeroed; never the same."""
    found = bytearray(data)
    while found == data:
        for _ in range(random.randint(1, 3)):
            what = random.choice(["flip", "flip", "cut", "insert", "repeat", "zeros"])
            at, length = random.randint(0, max(len(found) - 1, 0)), random.randint(1, 64)
            if what == "flip" and found:
                found[at] ^= 1 << random.randint(0, 7)
            elif what == "cut":
                del found[at : at + length if random.random() < 0.5 else len(found)]
            elif what == "insert":
                found[at:at] = random.randbytes(length)
            elif what == "repeat":
                found[at:at] = found[at : at + length]
            else:
                found[at : at + length] = bytes(length)
    return bytes(found)


def mutated_json(document: Any, random: Random) -> bytes:
    """A document in which some values are others, or something else altogether."""
    if random.random() < 0.1:
        return random.choice(NONE_AT_ALL)
    for _ in range(random.randint(1, 3)):
        paths = document_paths(document)[1:]
        if paths:
            document = with_value(document, random.choice(paths), random.choice(HOSTILE))
    return json.dumps(document).encode()
