"""A file as a sealed document knows it."""

import hashlib
from dataclasses import dataclass
from typing import Any

from mfdetr_cache.fields import Fields


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was written.

    Attributes:
        num_bytes: Its size.
        sha256: Of all its bytes, hexadecimal.
        index_sha256: Of a shard's index, see :class:`ShardReader`; empty for other files.
    """

    num_bytes: int
    sha256: str
    index_sha256: str = ""

    @classmethod
    def of(cls, data: bytes) -> "FileRecord":
        """Of a file that is no shard."""
        return cls(len(data), hashlib.sha256(data).hexdigest())

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a document."""
        plain: dict[str, Any] = {"bytes": self.num_bytes, "sha256": self.sha256}
        return {**plain, "index_sha256": self.index_sha256} if self.index_sha256 else plain

    @classmethod
    def from_fields(cls, fields: Fields) -> "FileRecord":
        """From a document."""
        index = fields.sha256("index_sha256") if "index_sha256" in fields.values else ""
        return cls(fields.integer("bytes"), fields.sha256("sha256"), index)
