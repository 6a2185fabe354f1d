"""JSON files that other people wrote: any encoding they come in, bounded, every fault one line."""

import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfdetr_cache.errors import DatasetError

# Plain files are as large as they are; a compressed one must not unpack to anything.
_MOST_UNPACKED_RATIO, _LEAST_UNPACKED_LIMIT = 100, 2**26
_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class JsonFile:
    """The content of a JSON file.

    Attributes:
        document: What it holds.
        name: File name without folder and ending, such as ``instances_val2017``.
        sha256: Hash of its bytes, after decompression.
    """

    document: Any
    name: str
    sha256: str


def read_json(path: Path, kind: str, advice: str) -> JsonFile:
    """Read a JSON file: UTF-8 with or without a byte order mark, UTF-16, UTF-32, or gzip of these.

    Args:
        path: The file.
        kind: What it should be, for the messages, such as ``annotation file``.
        advice: What to do when it is not there.

    Returns:
        Its content; ``NaN`` and ``Infinity`` are taken as numbers.

    Raises:
        DatasetError: If it is no readable file, unpacks to far more than its size, or is no JSON.
    """
    if not path.is_file():
        lacking = "is no file" if path.exists() else "does not exist"
        raise DatasetError(f"{kind} {path} {lacking}; {advice}")
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP_MAGIC):
            data = _unpacked(path, kind, len(data))
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{kind} {path} cannot be read ({error})") from error
    if not data.strip():
        raise DatasetError(f"{kind} {path} is empty; was it written to its end?")
    try:
        document = json.loads(data)
    except RecursionError as error:
        raise DatasetError(f"{kind} {path} is nested too deeply to be one") from error
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{kind} {path} is no text in UTF-8 or UTF-16 (byte {error.start}); save it as UTF-8"
        ) from error
    except (ValueError, OverflowError) as error:
        raise DatasetError(f"{kind} {path} is not JSON ({error})") from error
    except MemoryError as error:
        raise DatasetError(f"{kind} {path} does not fit into memory") from error
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return JsonFile(document, name.stem, hashlib.sha256(data).hexdigest())


def _unpacked(path: Path, kind: str, packed_bytes: int) -> bytes:
    limit = max(_LEAST_UNPACKED_LIMIT, _MOST_UNPACKED_RATIO * packed_bytes)
    data = bytearray()
    with gzip.open(path) as file:
        while block := file.read(_BLOCK):
            data += block
            if len(data) > limit:
                raise DatasetError(
                    f"{kind} {path} unpacks to more than {limit} bytes, "
                    f"{_MOST_UNPACKED_RATIO} times its size; unpack it yourself if you trust it"
                )
    return bytes(data)
