"""What a cache is, from its root's attributes: checked for type, bounds and the identity's hash."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mfdetr_cache.cache.arrays import ArraySpec, ColumnSpec, columns_of, row_arrays
from mfdetr_cache.cache.schema import (
    BASE_VIEW,
    FORMAT_NAME,
    FORMAT_VERSION,
    CacheLayout,
    stored_maps,
)
from mfdetr_cache.config import to_dict
from mfdetr_cache.errors import CacheError
from mfdetr_cache.fields import Fields
from mfdetr_cache.identity import Identity, identity_hash, spec_from_identity
from mfdetr_cache.types import DetectorSpec

# Of any cache, so that a number in a document cannot ask for more memory than a machine has.
_MOST_CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class Root:
    """What decides a cache's content, and how it is laid out.

    ``detector`` inside the identity is the detector's own.
    """

    identity: Identity
    spec: DetectorSpec
    layout: CacheLayout

    @classmethod
    def from_fields(cls, fields: Fields) -> "Root":
        """From the attributes of a cache.

        CacheError if this version does not read such a cache, or a field is not what it can
        be: one that the identity's hash does not cover, or does not fit.
        """
        where = fields.where
        _require_version(fields)
        identity = dict(fields.fields("identity").values)
        cache_id = fields.text("cache_id")
        if identity_hash(identity) != cache_id:
            raise CacheError(f"{where}: cache_id {cache_id[:32]!r} is not that of its identity")
        spec = spec_from_identity(identity.get("detector"), f"{where}: identity: detector")
        layout = CacheLayout.from_fields(fields.fields("layout"))
        root = cls(identity, spec, layout)
        _require_consistent(root, where)
        return root

    @functools.cached_property
    def cache_id(self) -> str:
        """Hash of the identity."""
        return identity_hash(self.identity)

    @property
    def names(self) -> dict[str, Any]:
        """What every sealed document of the cache says about it."""
        return {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "cache_id": self.cache_id,
        }

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the root group."""
        return {**self.names, "identity": self.identity, "layout": to_dict(self.layout)}

    @functools.cached_property
    def arrays(self) -> dict[str, dict[str, ArraySpec]]:
        """Every array that is written part by part, by view and by its path below the view."""
        return {v: row_arrays(self.spec, self.layout, v) for v in self.layout.views}

    @functools.cached_property
    def _columns(self) -> dict[str, ColumnSpec]:
        return columns_of(self.spec, self.layout)

    def column(self, path: str) -> ColumnSpec:
        """What the column at a path holds; CacheError if a cache has no such column."""
        try:
            return self._columns[path.rpartition("/")[2]]
        except KeyError:
            raise CacheError(f"a cache has no column {path[:200]!r}") from None


def _require_version(fields: Fields) -> None:
    name, version = fields["format"], fields["format_version"]
    if name == FORMAT_NAME and version == 1:
        raise CacheError(
            f"{fields.where} has cache format 1, whose checksums cannot tell one intact file from "
            "another; this version does not read it: extract again into another --cache"
        )
    if name != FORMAT_NAME or version != FORMAT_VERSION:
        raise CacheError(
            f"{fields.where} has cache format {str(version)[:20]}, this version reads "
            f"{FORMAT_VERSION}; update mfdetr-cache"
        )


def _require_consistent(root: Root, where: str) -> None:
    """Layout against detector, and no chunk larger than a machine can hold."""
    layout = root.layout
    if layout.views[:1] != (BASE_VIEW,):
        raise CacheError(f"{where}: the first view is not {BASE_VIEW}")
    if (layout.c1 == "roi") != (layout.c1_roi is not None):
        raise CacheError(f"{where}: c1 is {layout.c1!r} and c1_roi {layout.c1_roi!r}")
    names = {m.name for m in stored_maps(root.spec, layout)}
    if names != set(layout.maps):
        raise CacheError(f"{where}: maps {sorted(layout.maps)} and not {sorted(names)}")
    for spec in root.arrays[BASE_VIEW].values():
        if math.prod(spec.chunk) * np.dtype(spec.dtype).itemsize > _MOST_CHUNK_BYTES:
            raise CacheError(f"{where}: a chunk of {spec.path} has more than {_MOST_CHUNK_BYTES} B")
