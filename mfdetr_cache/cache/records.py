"""Files and columns as a sealed document knows them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mfdetr_cache.fields import Fields


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and SHA-256 of a file as it was written.

    ``index_sha256`` is that of a shard's index, see :class:`ShardReader`; empty for other files.
    """

    num_bytes: int
    sha256: str
    index_sha256: str = ""

    @classmethod
    def of(cls, data: bytes) -> "FileRecord":
        """Of a file that is no shard."""
        return cls(len(data), hashlib.sha256(data).hexdigest())


def plain_files(files: Mapping[str, FileRecord]) -> dict[str, Any]:
    """Files by key, as they stand in a document."""
    return {
        key: {"bytes": f.num_bytes, "sha256": f.sha256}
        | ({"index_sha256": f.index_sha256} if f.index_sha256 else {})
        for key, f in files.items()
    }


def files_of(fields: Fields) -> dict[str, FileRecord]:
    """The ``files`` of a document; inverse of :func:`plain_files`."""
    return {
        key: FileRecord(
            f.integer("bytes"),
            f.sha256("sha256"),
            f.sha256("index_sha256") if "index_sha256" in f.values else "",
        )
        for key, f in fields.fields("files").items()
    }


@dataclass(frozen=True)
class ColumnRecord:
    """Arrays that were written at once: their lengths by path, and all files by key."""

    lengths: dict[str, int]
    files: dict[str, FileRecord]

    @property
    def plain(self) -> dict[str, Any]:
        """As it stands in a document."""
        return {"columns": self.lengths, "files": plain_files(self.files)}

    @classmethod
    def of(cls, fields: Fields) -> "ColumnRecord":
        """From a document."""
        columns = fields.fields("columns")
        lengths = {path: columns.integer(path, 0, 2**40) for path in columns.values}
        return cls(lengths, files_of(fields))
