"""JSON files that other people wrote: any encoding they come in, bounded, every fault one line."""

import gzip
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfdetr_cache.coco.faults import short
from mfdetr_cache.coco.formats import told_of_xml
from mfdetr_cache.errors import DatasetError

# Plain files are as large as they are; a compressed one must not unpack to anything.
_MOST_UNPACKED_RATIO, _LEAST_UNPACKED_LIMIT = 100, 2**26
_GZIP_MAGIC, _ZIP_MAGIC = b"\x1f\x8b", b"PK\x03\x04"
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class JsonFile:
    """The content of a JSON file, its name without folder and ending, its hash when unpacked."""

    document: Any
    name: str
    sha256: str


def read_json(path: Path, kind: str, advice: str) -> JsonFile:
    """Read a JSON file: UTF-8 with or without a byte order mark, UTF-16, UTF-32, or packed.

    Packed is gzip, or a zip archive of one JSON file, as COCO's evaluation server takes results.
    ``NaN`` and ``Infinity`` are taken as numbers. ``kind``, such as ``annotation file``, and
    ``advice``, what to do when it is not there, are for the messages. DatasetError if it is no
    readable file, unpacks to far more than its size, or is no JSON.
    """
    if not path.is_file():
        lacking = "is no file" if path.exists() else "does not exist"
        raise DatasetError(f"{kind} {path} {lacking}; {advice}")
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP_MAGIC):
            with gzip.open(path) as file:
                data = _unpacked(file.read, path, kind, len(data))
        elif data.startswith(_ZIP_MAGIC):
            data = _of_zip(data, path, kind)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
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
        raise DatasetError(f"{kind} {path} is not JSON ({_said(error, data)})") from error
    except MemoryError as error:
        raise DatasetError(f"{kind} {path} does not fit into memory") from error
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return JsonFile(document, name.stem, hashlib.sha256(data).hexdigest())


def _said(error: Exception, data: bytes) -> str:
    """Why a file is no JSON, in words that tell what it is instead."""
    text = data.decode(json.detect_encoding(data), errors="replace").lstrip()
    if str(error).startswith("Extra data"):
        return f"{error}; several documents one behind the other, as in JSON Lines: write one list"
    if text[:1] not in ("{", "["):
        return told_of_xml(text[:2000]) or f"it begins with {short(text[:200])}"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    # Cut off behind a value, or within one.
    if not error.doc[error.pos + 1 :].strip() or error.msg.startswith("Unterminated"):
        return f"{error}; it ends before it is complete: was it written to its end?"
    return f"{error}, behind {short(error.doc[: error.pos][-36:])}"


def _of_zip(data: bytes, path: Path, kind: str) -> bytes:
    """The one JSON file of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith(".json")]
        if len(names) != 1:
            raise DatasetError(
                f"{kind} {path} is a zip archive with {len(names)} JSON files; unpack one"
            )
        with archive.open(names[0]) as file:
            return _unpacked(file.read, path, kind, len(data))


def _unpacked(read: Callable[[int], bytes], path: Path, kind: str, packed_bytes: int) -> bytes:
    limit = max(_LEAST_UNPACKED_LIMIT, _MOST_UNPACKED_RATIO * packed_bytes)
    data = bytearray()
    while block := read(_BLOCK):
        data += block
        if len(data) > limit:
            raise DatasetError(
                f"{kind} {path} unpacks to more than {limit} bytes, "
                f"{_MOST_UNPACKED_RATIO} times its size; unpack it yourself if you trust it"
            )
    return bytes(data)
